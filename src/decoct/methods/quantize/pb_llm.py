"""PB-LLM (arXiv 2310.00034): the weights that matter most in 8 bits, wherever they are; of all others only the sign."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor
from typing_extensions import override

from decoct.methods.base import LinearMethod, quantize_structure
from decoct.ops.feedback import Elimination
from decoct.ops.grid import resolve_group_size, stored_scale_dtype
from decoct.ops.refit import refit_scales
from decoct.ops.signs import finite_scale, group_mean, largest_entries
from decoct.stats import Gram
from decoct.weights import Binary, Plane, SparseInt, Sum, Weight

METRICS = ("hessian", "magnitude")


@dataclass(frozen=True, slots=True, kw_only=True)
class PBLLM(LinearMethod):
    """Signs with scales, plus integers at the salient entries; both rounded with GPTQ's error feedback.

    The result is `Sum(Binary, SparseInt)`: a salient entry keeps its sign bit, and its integer says how far it is from
    that. Bits a weight are 1, and for a fraction f of salient entries f · salient_bits, and their positions: about
    the entropy of f (0.5 for a tenth, 0.9 for three tenths).

    Attributes:
        salient: fraction of the matrix's entries that are kept as integers.
        salient_bits: of these, 2 to 8.
        group_size: input features whose signs share a scale, or "channel" (one a row).
        metric: what salient is: "hessian", w²/[H⁻¹]_jj, the loss from removing it; or "magnitude".
        num_refits: times that a row's scales are fitted together by least output error, and (but for the last time)
            everything is rounded again.
        damping: fraction of the Hessian's mean diagonal added to it.
        act_order: round the features with the largest second moment first.
    """

    salient: float = 0.1
    salient_bits: int = 8
    group_size: int | str = 64
    metric: str = "hessian"
    num_refits: int = 2
    damping: float = 0.01
    act_order: bool = True

    stat: ClassVar[type[Gram]] = Gram

    def __post_init__(self) -> None:
        if not 0 < self.salient < 1:
            raise ValueError(f"salient must lie between 0 and 1, not {self.salient}")
        if not 2 <= self.salient_bits <= 8:
            raise ValueError(f"salient_bits must be 2 to 8, not {self.salient_bits}")
        if self.metric not in METRICS:
            raise ValueError(f"metric must be one of {', '.join(METRICS)}, not {self.metric!r}")
        if self.num_refits < 0:
            raise ValueError(f"num_refits must be 0 or more, not {self.num_refits}")
        if not 0 < self.damping <= 1:
            raise ValueError(f"damping must be above 0 and at most 1, not {self.damping}")
        if self.group_size == "tensor":
            raise ValueError("group_size must be a positive number or channel, not 'tensor'")
        if self.group_size != "channel":
            resolve_group_size(self.group_size, 0)

    @override
    def check(self, shape: tuple[int, int]) -> None:
        """The group size must divide the input features."""
        resolve_group_size(self.group_size, shape[1])

    @override
    def workspace(self, shape: tuple[int, int]) -> int:
        """Weights, features, errors, scores and their order, signs and codes; the Hessian, its factor."""
        return 40 * shape[0] * shape[1] + 28 * shape[1] ** 2 + (1 << 27)

    @override
    def operations(self, shape: tuple[int, int]) -> float:
        """The factorization, and each round's feedback, normal equations and cost of a feature; the sorting."""
        out, cols = shape
        groups = cols // resolve_group_size(self.group_size, cols)
        rounds = max(1, self.num_refits) * (2.0 * out * cols**2 + 4e7 * cols)
        return rounds + self.num_refits * 2.0 * out * cols * (cols + groups**2) + 2.0 * cols**3 + 2000.0 * out * cols

    @override
    def compress(self, weight: Weight, stat: Gram) -> Weight:
        """Quantize; masks and low rank are kept."""
        return quantize_structure(weight, stat, self._dense, "pb_llm")

    def _dense(self, w: Float[Tensor, "out in"], mask: Bool[Tensor, "out in"] | None, stat: Gram) -> Weight:
        H = stat.matrix()
        importance = torch.diagonal(H)
        size = resolve_group_size(self.group_size, w.shape[1])
        present = importance.ne(0).expand(w.shape) if mask is None else mask & importance.ne(0)
        values = torch.where(present, w.float(), 0.0)
        elimination = Elimination.of(H, damping=self.damping, act_order=self.act_order)
        salient = largest_entries(self._saliency(values, elimination), round(self.salient * values.numel()))
        dtype = stored_scale_dtype(w.dtype)
        scale = finite_scale(group_mean(values.abs(), size, importance * (present & ~salient)), dtype)
        step = self._step(values, salient, scale.float().repeat_interleave(size, 1)).to(dtype)
        index = torch.arange(w.shape[1]) // size
        for turn in range(max(1, self.num_refits)):
            rounding = _PartRounding(scale, size, step, self.salient_bits, salient, mask)
            elimination.run(values, rounding)
            positive, codes = rounding.finish()
            if turn < self.num_refits:
                signs = (2.0 * positive - 1.0) * (1.0 if mask is None else mask)
                rest = values - (codes.float() - 2.0 ** (self.salient_bits - 1)) * step.float() * salient
                scale = finite_scale(refit_scales(rest, H, [signs], [scale], index)[0], dtype)
        integers = SparseInt.of(codes, salient, step, self.salient_bits, w.dtype)
        return Sum.of(Binary.of(Plane(positive, scale), size, w.dtype), integers)

    def _saliency(self, values: Float[Tensor, "out in"], elimination: Elimination) -> Float[Tensor, "out in"]:
        if self.metric == "magnitude":
            return values.abs()
        inverse = torch.empty_like(elimination.upper[0])
        inverse[elimination.order] = elimination.upper.square().sum(0)  # the diagonal of H⁻¹ = Uᵀ·U
        return values.abs() / inverse.sqrt()

    def _step(
        self, values: Float[Tensor, "out in"], salient: Bool[Tensor, "out in"], spread: Float[Tensor, "out in"]
    ) -> Float[Tensor, "out 1"]:
        """Of the integers: a row's farthest salient entry from its sign's value is the largest code."""
        far = ((values.abs() - spread).abs() * salient).amax(1, keepdim=True)
        return torch.where(far == 0, 1.0, far / (2 ** (self.salient_bits - 1) - 1))


class _PartRounding:
    """Rounds one feature at a time to signs, and where an entry is salient the rest to an integer."""

    def __init__(
        self, scale: Tensor, size: int, step: Tensor, bits: int, salient: Tensor, survivors: Tensor | None
    ) -> None:
        self._scale = scale.float().T.contiguous()  # [groups, out]
        self._size = size
        self._step = step.float().squeeze(1)
        self._middle = 2 ** (bits - 1)
        self._salient = salient.T.contiguous()
        self._survivors = None if survivors is None else survivors.T.contiguous()
        self._positive = torch.empty_like(self._salient)
        self._codes = torch.empty(self._salient.shape, dtype=torch.uint8)

    def __call__(self, column: Float[Tensor, " out"], feature: int, lost: Float[Tensor, " out"]) -> None:
        """See ops.feedback.Rounding."""
        scale = self._scale[feature // self._size]
        positive = (column >= 0) == (scale >= 0)
        rest = column - torch.where(positive, scale, -scale)
        code = rest.div(self._step).round_().clamp_(1 - self._middle, self._middle - 1)
        code *= self._salient[feature]
        self._positive[feature] = positive
        self._codes[feature] = code + self._middle
        torch.addcmul(rest, code, self._step, value=-1.0, out=lost)
        if self._survivors is not None:
            torch.where(self._survivors[feature], lost, column, out=lost)

    def finish(self) -> tuple[Bool[Tensor, "out in"], UInt8[Tensor, "out in"]]:
        """Signs and codes as matrices."""
        return self._positive.T.contiguous(), self._codes.T.contiguous()

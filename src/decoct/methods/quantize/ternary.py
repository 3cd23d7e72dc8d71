"""Ternary weights, after BitNet b1.58 (arXiv 2402.17764) and TWN (arXiv 1605.04711), of a trained model: 1.6 bits."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int8
from torch import Tensor
from typing_extensions import override

from decoct.methods.base import LinearMethod, quantize_structure
from decoct.ops.feedback import Elimination
from decoct.ops.grid import resolve_group_size, stored_scale_dtype
from decoct.ops.refit import refit_scales
from decoct.ops.ternary import FITS, fit_ternary, round_ternary, stored
from decoct.stats import Gram
from decoct.weights import Ternary as TernaryWeight
from decoct.weights import Weight


@dataclass(frozen=True, slots=True, kw_only=True)
class Ternary(LinearMethod):
    """Every weight becomes -scale, 0 or +scale. Without `feedback` it needs no data.

    Attributes:
        group_size: input features that share a scale, or "channel" (one a row), or "tensor" (one in all, BitNet's).
        fit: how scales are chosen: "optimal", by least squared error (weighted by the Hessian's diagonal with
            `feedback`), or "absmean", the mean of |w| as in BitNet.
        feedback: round feature by feature and let those not yet rounded make up for the error, as GPTQ does.
        num_refits: with `feedback`: times that all scales of a row are fitted together to the trits, by least output
            error, and (but for the last time) the weights rounded again. "tensor" has no rows to fit: use 0.
        damping: with `feedback`: fraction of the Hessian's mean diagonal added to it.
        act_order: with `feedback`: round the features with the largest second moment first.
    """

    group_size: int | str = 64
    fit: str = "optimal"
    feedback: bool = True
    num_refits: int = 2
    damping: float = 0.01
    act_order: bool = True

    def __post_init__(self) -> None:
        if self.fit not in FITS:
            raise ValueError(f"fit must be one of {', '.join(FITS)}, not {self.fit!r}")
        if self.num_refits < 0:
            raise ValueError(f"num_refits must be 0 or more, not {self.num_refits}")
        if not 0 < self.damping <= 1:
            raise ValueError(f"damping must be above 0 and at most 1, not {self.damping}")
        if isinstance(self.group_size, int) or self.group_size not in ("channel", "tensor"):
            resolve_group_size(self.group_size, 0)

    @property
    @override
    def stat(self) -> type[Gram] | None:
        return Gram if self.feedback else None

    @override
    def check(self, shape: tuple[int, int]) -> None:
        """The group size must divide the input features."""
        resolve_group_size(self.group_size, shape[1])

    @override
    def workspace(self, shape: tuple[int, int]) -> int:
        """Without data a few rows at a time; with it weights, features, errors and trits, the Hessian, its factor."""
        if not self.feedback:
            return 2 * shape[0] * shape[1] + (1 << 27)
        return 18 * shape[0] * shape[1] + 28 * shape[1] ** 2 + (1 << 27)

    @override
    def operations(self, shape: tuple[int, int]) -> float:
        """Sorting; with data the factorization, and each round's feedback, normal equations and cost a feature."""
        out, cols = shape
        if not self.feedback:
            return 1000.0 * out * cols
        groups = cols // resolve_group_size(self.group_size, cols)
        rounds = max(1, self.num_refits) * (2.0 * out * cols**2 + 2e7 * cols)
        return rounds + self.num_refits * 2.0 * out * cols * (cols + groups**2) + 2.0 * cols**3

    @override
    def compress(self, weight: Weight, stat: Gram | None = None) -> Weight:
        """Quantize; masks and low rank are kept."""
        return quantize_structure(weight, stat, self._dense, "ternary")

    def _dense(self, w: Float[Tensor, "out in"], mask: Bool[Tensor, "out in"] | None, stat: Gram | None) -> Weight:
        size = resolve_group_size(self.group_size, w.shape[1])
        values = w.float() if mask is None else torch.where(mask, w.float(), 0.0)
        if stat is None:
            scale = self._fit(values, size, w.dtype, None, mask)
            return TernaryWeight.of(round_ternary(values, scale), scale, size, w.dtype)
        H = stat.matrix()
        values = values.masked_fill(torch.diagonal(H) == 0, 0.0)  # what no input reaches must not move a scale
        scale = self._fit(values, size, w.dtype, torch.diagonal(H), mask)
        elimination = Elimination.of(H, damping=self.damping, act_order=self.act_order)
        for turn in range(max(1, self.num_refits)):
            rounding = _TritRounding(scale, size, (w.shape[0], w.shape[1]), mask)
            elimination.run(values, rounding)
            trits = rounding.finish()
            if turn < self.num_refits:
                scale = _refit(values, H, trits, scale, size)
        return TernaryWeight.of(trits, scale, size, w.dtype)

    def _fit(
        self, values: Tensor, size: int, dtype: torch.dtype, importance: Tensor | None, mask: Tensor | None
    ) -> Float[Tensor, "rows groups"]:
        rows, scale_dtype = values.shape[0], stored_scale_dtype(dtype)
        if self.group_size != "tensor":
            return fit_ternary(
                values, group_size=size, fit=self.fit, scale_dtype=scale_dtype, importance=importance, mask=mask
            )
        return fit_ternary(
            values.reshape(1, -1),
            group_size=values.numel(),
            fit=self.fit,
            scale_dtype=scale_dtype,
            importance=None if importance is None else importance.repeat(rows),
            mask=None if mask is None else mask.reshape(1, -1),
        )


class _TritRounding:
    """Rounds one feature at a time to scales that are fixed beforehand."""

    def __init__(self, scale: Tensor, size: int, shape: tuple[int, int], survivors: Tensor | None) -> None:
        self._scale = scale.float().T.contiguous()  # [groups, rows]; one row serves all where there is one scale
        self._size = size
        self._survivors = None if survivors is None else survivors.T.contiguous()
        self._trits = torch.empty(shape[1], shape[0], dtype=torch.int8)

    def __call__(self, column: Float[Tensor, " out"], feature: int, lost: Float[Tensor, " out"]) -> None:
        """See ops.feedback.Rounding."""
        scale = self._scale[feature // self._size]
        trit = column.div(scale).round_().clamp_(-1, 1)
        if self._survivors is not None:
            trit *= self._survivors[feature]
        self._trits[feature] = trit
        torch.addcmul(column, trit, scale, value=-1.0, out=lost)

    def finish(self) -> Int8[Tensor, "out in"]:
        """The trits as a matrix."""
        return self._trits.T.contiguous()


def _refit(
    values: Float[Tensor, "out in"], H: Float[Tensor, "in in"], trits: Int8[Tensor, "out in"], scale: Tensor, size: int
) -> Float[Tensor, "rows groups"]:
    """The scales of least output error for these trits, as they are stored; those of empty groups stay."""
    if scale.shape[0] == values.shape[0]:
        index = torch.arange(values.shape[1]) // size
        return stored(refit_scales(values, H, [trits], [scale], index)[0], scale.dtype)
    seen = trits.float() @ H
    square = (seen * trits).sum()
    return stored(torch.where(square > 0, (seen * values).sum() / square, scale.float()), scale.dtype)

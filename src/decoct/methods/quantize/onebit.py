"""OneBit (arXiv 2402.11295): signs, a factor for each row and a factor for each column; about 1.05 bits a weight."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from typing_extensions import override

from decoct.methods.base import LinearMethod, quantize_structure
from decoct.ops.feedback import Elimination
from decoct.ops.grid import stored_scale_dtype
from decoct.ops.rank_one import best_rank_one, fit_columns, fit_rows
from decoct.ops.signs import finite_scale
from decoct.stats import Gram
from decoct.weights import Binary, Plane, Weight

_INNER_STEPS = 2  # alternations of rows and columns for given signs; more change nothing to speak of


@dataclass(frozen=True, slots=True, kw_only=True)
class OneBit(LinearMethod):
    """w ≈ sign(w) ⊙ (a · bᵀ), begun with the best rank one of |w| (the paper's SVID), then fitted to the inputs.

    The paper goes on to train the whole model; what is here takes seconds, and any training can follow, because a and
    b are stored as real numbers. `num_rounds: 0` is SVID alone and needs no data.

    Attributes:
        num_rounds: times that signs are chosen (with `feedback`) and both vectors fitted by least output error.
        feedback: choose signs feature by feature, letting those still to come make up for the error, as GPTQ does;
            otherwise they stay those of w.
        damping: with `feedback`: fraction of the Hessian's mean diagonal added to it.
        act_order: with `feedback`: take the features with the largest second moment first.
    """

    num_rounds: int = 2
    feedback: bool = True
    damping: float = 0.01
    act_order: bool = True

    def __post_init__(self) -> None:
        if self.num_rounds < 0:
            raise ValueError(f"num_rounds must be 0 or more, not {self.num_rounds}")
        if not 0 < self.damping <= 1:
            raise ValueError(f"damping must be above 0 and at most 1, not {self.damping}")

    @property
    @override
    def stat(self) -> type[Gram] | None:
        return Gram if self.num_rounds else None

    @override
    def workspace(self, shape: tuple[int, int]) -> int:
        """Weights, sizes and their products; with data also features, errors, the Hessian, its factor and others'."""
        if not self.num_rounds:
            return 16 * shape[0] * shape[1]
        return 28 * shape[0] * shape[1] + 28 * shape[1] ** 2

    @override
    def operations(self, shape: tuple[int, int]) -> float:
        """Some tens of passes; with data the factorization, each round's feedback and normal equations."""
        out, cols = shape
        fitting = _INNER_STEPS * (6.0 * out * cols**2 + cols**3)
        rounding = 2.0 * out * cols**2 + 2e7 * cols if self.feedback else 0.0
        return 200.0 * out * cols + self.num_rounds * (fitting + rounding) + (2.0 * cols**3 if self.num_rounds else 0.0)

    @override
    def compress(self, weight: Weight, stat: Gram | None = None) -> Weight:
        """Quantize; masks and low rank are kept."""
        return quantize_structure(weight, stat, self._dense, "onebit")

    def _dense(self, w: Float[Tensor, "out in"], mask: Bool[Tensor, "out in"] | None, stat: Gram | None) -> Weight:
        largest = w.float().abs().max().clamp(min=torch.finfo(torch.float32).tiny)
        if not torch.isfinite(largest):
            raise ValueError("the weights hold NaN or infinite values; the checkpoint is damaged")
        values = w.float() / largest
        values = values if mask is None else torch.where(mask, values, 0.0)
        H = None if stat is None else stat.matrix()
        if H is not None:
            values = values.masked_fill(torch.diagonal(H) == 0, 0.0)
        rows, columns = best_rank_one(values.abs(), mask)
        positive = values >= 0
        if H is not None:
            rows, columns, positive = self._fit(values, H, mask, rows, columns)
        dtype = stored_scale_dtype(w.dtype)
        scale = finite_scale((rows * largest).unsqueeze(1), dtype)
        return Binary.of(Plane(positive, scale), w.shape[1], w.dtype, columns=finite_scale(columns, dtype))

    def _fit(
        self, values: Tensor, H: Tensor, mask: Tensor | None, rows: Tensor, columns: Tensor
    ) -> tuple[Float[Tensor, " out"], Float[Tensor, "in"], Bool[Tensor, "out in"]]:
        """Alternate between signs and vectors."""
        positive = values >= 0
        elimination = Elimination.of(H, damping=self.damping, act_order=self.act_order) if self.feedback else None
        for _ in range(self.num_rounds):
            if elimination is not None:
                rounding = _SignRounding(rows, columns, mask)
                elimination.run(values, rounding)
                positive = rounding.finish()
            units = (2.0 * positive - 1.0) * (1.0 if mask is None else mask)
            for _ in range(_INNER_STEPS):
                rows = fit_rows(values, H, units, columns)
                columns = fit_columns(values, H, units, rows, columns)
            size = columns.abs().mean().clamp(min=torch.finfo(torch.float32).tiny)
            rows, columns = rows * size, columns / size  # so that both fit 16 bits
        return rows, columns, positive


class _SignRounding:
    """Rounds one feature at a time to plus or minus the product of its row's and its column's factor."""

    def __init__(self, rows: Tensor, columns: Tensor, survivors: Tensor | None) -> None:
        self._rows, self._columns = rows, columns
        self._survivors = None if survivors is None else survivors.T.contiguous()
        self._positive = torch.empty(columns.numel(), rows.numel(), dtype=torch.bool)

    def __call__(self, column: Float[Tensor, " out"], feature: int, lost: Float[Tensor, " out"]) -> None:
        """See ops.feedback.Rounding."""
        factor = self._rows * self._columns[feature]
        self._positive[feature] = (column >= 0) == (factor >= 0)
        value = torch.where(column >= 0, factor.abs(), -factor.abs())
        if self._survivors is not None:
            value *= self._survivors[feature]
        torch.sub(column, value, out=lost)

    def finish(self) -> Bool[Tensor, "out in"]:
        """The signs as a matrix."""
        return self._positive.T.contiguous()

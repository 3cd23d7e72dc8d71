"""OWQ (arXiv 2306.02272): the input features whose rounding would cost most stay in 16 bits, the rest get GPTQ."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from decoct.methods.base import LinearMethod, quantize_structure
from decoct.ops.feedback import Elimination, GridRounding
from decoct.ops.grid import Grid, check_grid, dequantize, fit_grid, quantize, resolve_group_size, stored_scale_dtype
from decoct.stats import Gram
from decoct.weights import Columns, GroupInt, Sum, Weight


@dataclass(frozen=True, slots=True, kw_only=True)
class OWQ(LinearMethod):
    """Mixed precision by columns. The kept columns come last, so they also make up for the errors of all others.

    The cost of a feature j is H_jj·‖Δw_j‖², with Δw_j what rounding to nearest does to its column.

    Attributes:
        bits: 2 to 8.
        group_size: input features that share a scale, or "channel", or "tensor".
        keep: fraction of the input features that stay in 16 bits, at least one. Their codes are stored too, as zeros.
        symmetric: grid around zero, without zero points.
        damping: fraction of the Hessian's mean diagonal added to it; raised if the factorization fails.
        act_order: round the features with the largest second moment first.
        clip_search: choose each group's span by least squared error, weighted by what an error costs once later
            features have made up for it as far as they can.
    """

    bits: int = 4
    group_size: int | str = 64
    keep: float = 0.005
    symmetric: bool = True
    damping: float = 0.01
    act_order: bool = True
    clip_search: bool = True

    stat: ClassVar[type[Gram]] = Gram

    def __post_init__(self) -> None:
        check_grid(self.bits, self.group_size)
        if not 0 < self.keep < 1:
            raise ValueError(f"keep is the fraction of the input features, between 0 and 1, not {self.keep}")
        if not 0 < self.damping <= 1:
            raise ValueError(f"damping must be above 0 and at most 1, not {self.damping}")

    def check(self, shape: tuple[int, int]) -> None:
        """The group size must divide the input features."""
        resolve_group_size(self.group_size, shape[1])

    def workspace(self, shape: tuple[int, int]) -> int:
        """Weights, features, errors and what the search tries in float32, codes; the Hessian, its factor."""
        return 26 * shape[0] * shape[1] + 24 * shape[1] ** 2

    def operations(self, shape: tuple[int, int]) -> float:
        """GPTQ's, and a second search for scales."""
        out, cols = shape
        return 2.0 * out * cols**2 + 2.0 * cols**3 + 2e7 * cols + 1e3 * out * cols

    def compress(self, weight: Weight, stat: Gram) -> Weight:
        """Quantize; an existing mask takes part in the compensation and is kept exactly."""
        return quantize_structure(weight, stat, self._dense, "owq")

    def _dense(self, w: Float[Tensor, "out in"], mask: Bool[Tensor, "out in"] | None, stat: Gram) -> Weight:
        H = stat.matrix()
        diagonal = torch.diagonal(H)
        values = w.float().masked_fill(diagonal == 0, 0.0)
        if mask is not None:
            values = torch.where(mask, values, 0)
        stored = stored_scale_dtype(w.dtype)
        # Scales that suit the loudest column would hide how much of its group's room it takes: so plain spans here.
        spans = fit_grid(
            values, bits=self.bits, group_size=self.group_size, symmetric=self.symmetric, scale_dtype=stored
        )
        kept = weak_columns(values, diagonal, spans, self.keep)
        elimination = Elimination.of(H, damping=self.damping, act_order=self.act_order, last=kept)
        importance = elimination.pivots().pow(-2)
        grid = self._grid(values.index_fill(1, kept, 0.0), importance, stored)
        rounding = GridRounding(grid, (w.shape[0], w.shape[1]), mask)
        columns = elimination.run(values, rounding, num_kept=kept.numel())
        if mask is not None:
            columns = torch.where(mask[:, kept], columns, 0)
        whole = Columns.of(columns.to(stored), kept, w.shape[1], w.dtype)
        return Sum.of(GroupInt.of(rounding.finish(), grid, w.dtype), whole)

    def _grid(self, w: Float[Tensor, "out in"], importance: Float[Tensor, " in"], dtype: torch.dtype) -> Grid:
        return fit_grid(
            w,
            bits=self.bits,
            group_size=self.group_size,
            symmetric=self.symmetric,
            scale_dtype=dtype,
            importance=importance,
            search=self.clip_search,
        )


def weak_columns(
    w: Float[Tensor, "out in"], diagonal: Float[Tensor, " in"], grid: Grid, keep: float
) -> Int[Tensor, " kept"]:
    """The fraction `keep` of the columns, at least one, with the largest H_jj·‖Δw_j‖²; the largest first."""
    lost = dequantize(quantize(w, grid), grid).sub_(w).square_().sum(0)
    count = max(1, round(keep * w.shape[1]))
    return (lost * diagonal).argsort(descending=True, stable=True)[:count]

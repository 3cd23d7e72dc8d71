"""GPTQ (arXiv 2210.17323): round one input feature at a time, letting those not yet rounded make up for the error."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from decoct.methods.base import LinearMethod, quantize_structure
from decoct.ops.feedback import Elimination, GridRounding
from decoct.ops.grid import Grid, check_grid, fit_grid, resolve_group_size, stored_scale_dtype
from decoct.stats import Gram
from decoct.weights import GroupInt, Weight


@dataclass(frozen=True, slots=True, kw_only=True)
class GPTQ(LinearMethod):
    """Second-order rounding with the Gram matrix of the layer's inputs.

    Attributes:
        bits: 2 to 8.
        group_size: input features that share a scale, or "channel", or "tensor". Groups are static: their scales are
            fixed before any column moves, so `act_order` needs no index at run time.
        symmetric: grid around zero, without zero points.
        damping: fraction of the Hessian's mean diagonal added to it; raised if the factorization fails.
        act_order: round the features with the largest second moment first.
        clip_search: choose each group's span by least squared error weighted by the Hessian's diagonal.
    """

    bits: int = 4
    group_size: int | str = 64
    symmetric: bool = True
    damping: float = 0.01
    act_order: bool = True
    clip_search: bool = True

    stat: ClassVar[type[Gram]] = Gram

    def __post_init__(self) -> None:
        check_grid(self.bits, self.group_size)
        if not 0 < self.damping <= 1:
            raise ValueError(f"damping must be above 0 and at most 1, not {self.damping}")

    def check(self, shape: tuple[int, int]) -> None:
        """The group size must divide the input features."""
        resolve_group_size(self.group_size, shape[1])

    def workspace(self, shape: tuple[int, int]) -> int:
        """Weights, features and errors in float32, codes; the Hessian, its factor and their temporaries."""
        return 14 * shape[0] * shape[1] + 24 * shape[1] ** 2

    def operations(self, shape: tuple[int, int]) -> float:
        """Pushing errors on, the factorization, and a fixed cost for each feature."""
        out, cols = shape
        return 2.0 * out * cols**2 + 2.0 * cols**3 + 2e7 * cols

    def compress(self, weight: Weight, stat: Gram) -> Weight:
        """Quantize; an existing mask takes part in the compensation and is kept exactly."""
        return quantize_structure(weight, stat, self._dense, "gptq")

    def _dense(self, w: Float[Tensor, "out in"], mask: Bool[Tensor, "out in"] | None, stat: Gram) -> Weight:
        H = stat.matrix()
        values = w.float().masked_fill(torch.diagonal(H) == 0, 0.0)  # what no input reaches must not widen the grid
        grid = fit_grid(
            values,
            bits=self.bits,
            group_size=self.group_size,
            symmetric=self.symmetric,
            scale_dtype=stored_scale_dtype(w.dtype),
            importance=torch.diagonal(H),
            search=self.clip_search,
        )
        codes = gptq_round(values, H, grid, mask=mask, damping=self.damping, act_order=self.act_order)
        return GroupInt.of(codes, grid, w.dtype)


def gptq_round(
    w: Float[Tensor, "out in"],
    H: Float[Tensor, "in in"],
    grid: Grid,
    *,
    mask: Bool[Tensor, "out in"] | None = None,
    damping: float = 0.01,
    act_order: bool = True,
) -> UInt8[Tensor, "out in"]:
    """Codes on `grid` that minimise tr((w - ŵ)·H·(w - ŵ)ᵀ) greedily, feature by feature.

    Args:
        w: float32.
        H: float32, symmetric; a feature that never fired has H_jj = 0 and is rounded to zero.
        grid: scales and zero points, in the original order of features.
        mask: True where a weight survives; the others are held at zero and their loss is compensated too.
        damping: see GPTQ.
        act_order: see GPTQ.

    Raises:
        ValueError: H is not finite or cannot be factored.
    """
    rounding = GridRounding(grid, (w.shape[0], w.shape[1]), mask)
    Elimination.of(H, damping=damping, act_order=act_order).run(w, rounding)
    return rounding.finish()

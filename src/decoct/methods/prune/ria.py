"""RIA (arXiv 2402.17946): drop the weights that are small beside the others of their row and of their column."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from decoct.methods.pruning import Pruning
from decoct.stats import ColumnNorm
from decoct.weights import Weight


def relative_importance(w: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """|w_ij| / Σ_j |w_ij| + |w_ij| / Σ_i |w_ij|, float32; zero where the weight is."""
    size = w.float().abs()
    rows, cols = size.sum(1, keepdim=True, dtype=torch.float64), size.sum(0, keepdim=True, dtype=torch.float64)
    of_row, of_column = (torch.where(total > 0, total.reciprocal(), 0.0).float() for total in (rows, cols))
    return size * of_row + size * of_column


@dataclass(frozen=True, slots=True, kw_only=True)
class RIA(Pruning):
    """Relative importance times input norm to a power, without updating what survives. See Pruning for the settings.

    Plain products of size and norm empty whole columns whose weights or inputs are small; shares of the row's and the
    column's sum leave something of each.

    Attributes:
        power: of the input norm; 0 takes no notice of inputs.
    """

    scope: str = "layer"
    power: float = 0.5

    stat: ClassVar[type[ColumnNorm]] = ColumnNorm

    def __post_init__(self) -> None:
        Pruning.__post_init__(self)
        if self.power < 0:
            raise ValueError(f"power must be 0 or more, not {self.power}")

    def compress(self, weight: Weight, stat: ColumnNorm) -> Weight:
        """Prune; what was pruned before stays pruned, what was quantized stays quantized."""
        return self.drop(weight, lambda w: relative_importance(w) * stat.norm().pow(self.power), "ria")

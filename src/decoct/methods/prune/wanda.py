"""Wanda (arXiv 2306.11695): drop the weights that are small in |w| times input norm."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from decoct.methods.pruning import Pruning
from decoct.stats import ColumnNorm
from decoct.weights import Weight


def wanda_score(w: Float[Tensor, "out in"], x_norm: Float[Tensor, "in"]) -> Float[Tensor, "out in"]:
    """|w|·‖x‖, float32.

    Args:
        w: the matrix.
        x_norm: norm of each input feature over the calibration tokens, up to a common factor.
    """
    return w.float().abs() * x_norm.float()


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanda(Pruning):
    """Prune each output row to the same sparsity, without updating what survives. See Pruning for the settings."""

    stat: ClassVar[type[ColumnNorm]] = ColumnNorm

    def compress(self, weight: Weight, stat: ColumnNorm) -> Weight:
        """Prune; what was pruned before stays pruned, what was quantized stays quantized."""
        return self.drop(weight, lambda w: wanda_score(w, stat.norm()), "wanda")

"""Optimal brain damage (LeCun and others, 1990; as restated in arXiv 2208.11580): drop by the Hessian's diagonal."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from decoct.methods.pruning import Pruning
from decoct.stats import ColumnNorm
from decoct.weights import Weight


def saliency_root(w: Float[Tensor, "out in"], x_norm: Float[Tensor, "in"]) -> Float[Tensor, "out in"]:
    """√(½·H_jj·w²), float32, with H = 2·E[x·xᵀ]: the root ranks entries alike, and squares no large number.

    Args:
        w: the matrix.
        x_norm: root mean square of each input feature, √(½·H_jj).
    """
    return w.float().abs() * x_norm.float()


@dataclass(frozen=True, slots=True, kw_only=True)
class OBD(Pruning):
    """Drop what raises the squared output error least if weights do not interact; nothing that survives moves.

    See Pruning for the settings. In a single row this is Wanda's choice: with `scope: row` the two are the same.
    """

    scope: str = "layer"

    stat: ClassVar[type[ColumnNorm]] = ColumnNorm

    def compress(self, weight: Weight, stat: ColumnNorm) -> Weight:
        """Prune; what was pruned before stays pruned, what was quantized stays quantized."""
        return self.drop(weight, lambda w: saliency_root(w, stat.norm()), "obd")

"""Wanda (arXiv 2306.11695): drop the weights that are small in |w| times input norm."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from decoct.methods.base import LinearMethod, refusal
from decoct.stats import ColumnNorm
from decoct.weights import Dense, FloatBlock, GroupInt, Masked, Sparse, Weight


def wanda_mask(
    w: Float[Tensor, "out in"], x_norm: Float[Tensor, "in"], *, num_dropped: int, every: int | None = None
) -> Bool[Tensor, "out in"]:
    """Survivors: all but the `num_dropped` entries of each row with the least |w|·‖x‖ (ties: the later ones survive).

    Args:
        w: the matrix.
        x_norm: norm of each input feature over the calibration tokens, up to a common factor.
        num_dropped: entries dropped of each row, or of each run of `every` consecutive entries.
        every: run length of an N:M pattern; None for whole rows.
    """
    score = w.float().abs() * x_norm.float()
    runs = score.reshape(w.shape[0], -1, every or w.shape[1])
    dropped = runs.argsort(dim=-1, stable=True)[..., :num_dropped]
    mask = torch.ones_like(runs, dtype=torch.bool)
    return mask.scatter_(-1, dropped, value=False).reshape(w.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanda(LinearMethod):
    """Prune each output row to the same sparsity, without updating what survives.

    Unstructured zeros make the file smaller, not the matrix product faster; each stored weight also costs one bit
    of bitmap.

    Attributes:
        sparsity: fraction removed from each row; ignored when n and m are given.
        n: with `m`: entries that survive of every m consecutive ones (2 of 4 for sparse tensor cores).
        m: see n.
    """

    sparsity: float = 0.5
    n: int | None = None
    m: int | None = None

    stat: ClassVar[type[ColumnNorm]] = ColumnNorm

    def __post_init__(self) -> None:
        if not 0 < self.sparsity < 1:
            raise ValueError(f"sparsity must lie between 0 and 1, not {self.sparsity}")
        if (self.n is None) != (self.m is None):
            raise ValueError("n and m go together: n of every m weights survive")
        if self.n is not None and self.m is not None and not 0 < self.n < self.m:
            raise ValueError(f"n must lie between 0 and m={self.m}, not {self.n}")

    def check(self, shape: tuple[int, int]) -> None:
        """An N:M pattern must divide the input features."""
        if self.m is not None and shape[1] % self.m:
            raise ValueError(f"a pattern of {self.n}:{self.m} does not divide {shape[1]} input features")

    def compress(self, weight: Weight, stat: ColumnNorm) -> Weight:
        """Prune; what was pruned before stays pruned, what was quantized stays quantized."""
        if not isinstance(weight, Dense | Sparse | GroupInt | FloatBlock | Masked):
            raise refusal("wanda", weight)
        values = weight.unpack()
        self.check((values.shape[0], values.shape[1]))
        if not torch.isfinite(values).all():
            raise ValueError("the weights hold NaN or infinite values; the checkpoint is damaged")
        run = self.m or values.shape[1]
        num_dropped = run - self.n if self.n is not None else round(self.sparsity * run)
        survivors = wanda_mask(values, stat.norm(), num_dropped=num_dropped, every=self.m)
        match weight:
            case Dense():
                return Sparse.of(values, survivors)
            case Sparse():
                return Sparse.of(values, survivors & weight.survivors())
            case Masked(inner=inner):
                return Masked.of(inner, survivors & weight.survivors())
        return Masked.of(weight, survivors)

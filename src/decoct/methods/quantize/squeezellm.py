"""SqueezeLLM (arXiv 2306.07629): a table of values for each row, by weighted k-means, and sparse outliers."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from decoct.methods.base import LinearMethod, quantize_structure
from decoct.ops.codebook import lookup, nearest
from decoct.ops.feedback import Elimination, OutlierRounding, TableRounding
from decoct.ops.grid import stored_scale_dtype
from decoct.ops.kmeans import weighted_kmeans
from decoct.stats import Gram
from decoct.weights import Codebook, Sparse, Sum, Weight

_KMEANS_BYTES = 1 << 26
_KMEANS_ROW, _KMEANS_ENTRY = 1e7, 1e4  # measured, in operations of a matrix product that takes as long


@dataclass(frozen=True, slots=True, kw_only=True)
class SqueezeLLM(LinearMethod):
    """Non-uniform quantization: each row has 2**bits values of its own, placed where its sensitive weights are.

    The paper's sensitivity of a weight is its squared gradient on the model's loss. Here it comes from the layer's
    inputs alone: the Hessian's diagonal, the same for every row; with `feedback`, what an error costs when the features
    after it have made up for it as far as they can.

    Attributes:
        bits: 1 to 8. A row's table costs 16 · 2**bits bits.
        outliers: fraction of the entries, those of largest magnitude, that are stored apart in 16 bits; each costs 32.
        feedback: round feature by feature and let those not yet rounded make up for the error, as GPTQ does; the paper
            rounds to the nearest value.
        damping: for `feedback`: fraction of the Hessian's mean diagonal added to it; raised if the factorization fails.
        act_order: for `feedback`: round the features with the largest second moment first.
    """

    bits: int = 4
    outliers: float = 0.0045
    feedback: bool = True
    damping: float = 0.01
    act_order: bool = True

    stat: ClassVar[type[Gram]] = Gram

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"bits must be 1 to 8, not {self.bits}")
        if not 0 <= self.outliers < 0.5:
            raise ValueError(f"outliers is a fraction of the weights, at least 0 and below 0.5, not {self.outliers}")
        if not 0 < self.damping <= 1:
            raise ValueError(f"damping must be above 0 and at most 1, not {self.damping}")

    def workspace(self, shape: tuple[int, int]) -> int:
        """Weights, features, errors, importance and limits in float32, codes; the Hessian, its factor; k-means."""
        return 26 * shape[0] * shape[1] + 24 * shape[1] ** 2 + _KMEANS_BYTES

    def operations(self, shape: tuple[int, int]) -> float:
        """K-means for each row; with feedback, GPTQ's work."""
        out, cols = shape
        clustering = _KMEANS_ROW * out + _KMEANS_ENTRY * out * cols
        return clustering + (2.0 * out * cols**2 + 2.0 * cols**3 + 4e7 * cols) * self.feedback

    def compress(self, weight: Weight, stat: Gram) -> Weight:
        """Quantize; an existing mask is kept exactly, and with feedback its loss is made up for."""
        return quantize_structure(weight, stat, self._dense, "squeezellm")

    def _dense(self, w: Float[Tensor, "out in"], mask: Bool[Tensor, "out in"] | None, stat: Gram) -> Weight:
        H = stat.matrix()
        diagonal = torch.diagonal(H)
        dead = diagonal == 0
        values = w.float().masked_fill(dead, 0.0)
        if mask is not None:
            values = torch.where(mask, values, 0)
        elimination = None
        sensitivity = diagonal
        if self.feedback:
            elimination = Elimination.of(H, damping=self.damping, act_order=self.act_order)
            sensitivity = elimination.pivots().pow(-2).masked_fill(dead, 0.0)
        return squeeze(
            values,
            sensitivity.unsqueeze(0),
            bits=self.bits,
            num_outliers=round(self.outliers * w.numel()),
            elimination=elimination,
            mask=mask,
            dtype=w.dtype,
        )


def squeeze(
    w: Float[Tensor, "out in"],
    sensitivity: Float[Tensor, "#out in"],
    *,
    bits: int,
    num_outliers: int,
    elimination: Elimination | None,
    mask: Bool[Tensor, "out in"] | None,
    dtype: torch.dtype,
) -> Weight:
    """Tables by k-means, weighted by sensitivity; codes by nearest value, or with feedback; outliers beside them.

    Args:
        w: float32.
        sensitivity: what a squared error costs, of each entry (a Fisher diagonal fits here) or of each column.
        bits: of a code.
        num_outliers: entries of largest magnitude that are stored apart.
        elimination: how errors reach later features; None: each entry is rounded to the nearest value.
        mask: True where a weight survives.
        dtype: what the matrix was before; tables and outliers are stored in 16 bits.

    Raises:
        ValueError: weights or sensitivities that are not finite.
    """
    stored = stored_scale_dtype(dtype)
    apart = _largest(w, num_outliers)
    used = ~apart if mask is None else mask & ~apart
    plain = num_outliers == 0 and mask is None
    table = weighted_kmeans(w, sensitivity if plain else sensitivity * used, 2**bits).to(stored)
    if elimination is None:
        codes = nearest(w, table)
        lost = w - lookup(codes, table.float().unsqueeze(2))
        outliers = torch.where(apart, lost, 0.0).to(stored)
    else:
        rounding = TableRounding(table, w.shape[1], mask)
        limit = torch.where(apart.T, -1.0, torch.inf)
        watched = OutlierRounding(rounding, (w.shape[0], w.shape[1]), limit, stored)
        elimination.run(w, watched)
        codes, outliers = rounding.finish(), watched.finish()
    base = Codebook.of(codes, table.unsqueeze(2), dtype)
    return base if num_outliers == 0 else Sum.of(base, Sparse.of(outliers, apart))


def _largest(w: Float[Tensor, "out in"], count: int) -> Bool[Tensor, "out in"]:
    """True for the `count` entries of largest magnitude."""
    chosen = torch.zeros(w.numel(), dtype=torch.bool, device=w.device)
    chosen[w.abs().flatten().topk(count).indices] = True
    return chosen.reshape(w.shape)

"""SpQR (arXiv 2306.03078): small groups whose scales are quantized too, and sensitive weights stored apart."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from decoct.methods.base import LinearMethod, quantize_structure
from decoct.ops.feedback import Elimination, GridRounding, OutlierRounding
from decoct.ops.grid import check_grid, resolve_group_size, stored_scale_dtype
from decoct.ops.outliers import leave_one_out_gain
from decoct.ops.two_level import fit_two_level
from decoct.stats import Gram
from decoct.weights import Sparse, Sum, TwoLevelInt, Weight


@dataclass(frozen=True, slots=True, kw_only=True)
class SpQR(LinearMethod):
    """GPTQ's rounding on groups of few weights; what would cost much to round is stored in 16 bits instead.

    The cost of rounding a weight is its error when its turn comes, relative to how far later features can make up for
    it. A weight whose cost exceeds `outlier_threshold` times that of rounding a typical weight to zero is an outlier.

    Attributes:
        bits: 2 to 8.
        group_size: input features that share a scale and a zero point, or "channel".
        scale_bits: of each scale, 1 to 8.
        rows_per_block: rows that share the two 16-bit numbers which scale codes of a group refer to.
        outlier_threshold: see above; each outlier costs 32 bits. None: no outliers.
        damping: fraction of the Hessian's mean diagonal added to it; raised if the factorization fails.
        act_order: round the features with the largest second moment first. Groups are those of the original order.
    """

    bits: int = 4
    group_size: int | str = 16
    scale_bits: int = 3
    rows_per_block: int = 16
    outlier_threshold: float | None = 0.2
    damping: float = 1.0
    act_order: bool = True

    stat: ClassVar[type[Gram]] = Gram

    def __post_init__(self) -> None:
        check_grid(self.bits, self.group_size)
        if self.group_size == "tensor":
            raise ValueError("group_size must be a positive number or channel: a single scale has no second level")
        if not 1 <= self.scale_bits <= 8:
            raise ValueError(f"scale_bits must be 1 to 8, not {self.scale_bits}")
        if self.rows_per_block < 1:
            raise ValueError(f"rows_per_block must be at least 1, not {self.rows_per_block}")
        if self.outlier_threshold is not None and self.outlier_threshold <= 0:
            raise ValueError(f"outlier_threshold must be above 0, or null for none, not {self.outlier_threshold}")
        if not 0 < self.damping <= 1:
            raise ValueError(f"damping must be above 0 and at most 1, not {self.damping}")

    def check(self, shape: tuple[int, int]) -> None:
        """The group size must divide the input features."""
        resolve_group_size(self.group_size, shape[1])

    def workspace(self, shape: tuple[int, int]) -> int:
        """Weights, features, errors, gains and outliers, codes; the Hessian, its factor and their temporaries."""
        return 26 * shape[0] * shape[1] + 24 * shape[1] ** 2 + (1 << 26)

    def operations(self, shape: tuple[int, int]) -> float:
        """GPTQ's, and trying each scale code on every group."""
        out, cols = shape
        return 2.0 * out * cols**2 + 2.0 * cols**3 + 4e7 * cols + 100.0 * 2.0**self.scale_bits * out * cols

    def compress(self, weight: Weight, stat: Gram) -> Weight:
        """Quantize; an existing mask takes part in the compensation and is kept exactly."""
        return quantize_structure(weight, stat, self._dense, "spqr")

    def _dense(self, w: Float[Tensor, "out in"], mask: Bool[Tensor, "out in"] | None, stat: Gram) -> Weight:
        elimination = Elimination.of(stat.matrix(), damping=self.damping, act_order=self.act_order)
        values = w.float().masked_fill(elimination.dead, 0.0)
        if mask is not None:
            values = torch.where(mask, values, 0)
        if not torch.isfinite(values).all():
            raise ValueError("the weights hold NaN or infinite values; the checkpoint is damaged")
        importance = elimination.pivots().pow(-2)
        group_size = resolve_group_size(self.group_size, w.shape[1])
        threshold = self._threshold(values, importance)
        gain = leave_one_out_gain(values, importance, bits=self.bits, group_size=group_size, survivors=mask)
        used = gain <= threshold if mask is None else (gain <= threshold) & mask
        stored = stored_scale_dtype(w.dtype)
        grid, scales = fit_two_level(
            values,
            used,
            importance,
            bits=self.bits,
            group_size=group_size,
            scale_bits=self.scale_bits,
            rows_per_block=self.rows_per_block,
            scale_dtype=stored,
        )
        shape = (w.shape[0], w.shape[1])
        rounding = GridRounding(grid, shape, mask)
        limit = (threshold / importance).unsqueeze(1)
        if mask is not None:  # what is pruned costs much, but stays pruned
            limit = torch.where(mask.T, limit, torch.inf)
        watched = OutlierRounding(rounding, shape, limit, stored)
        elimination.run(values, watched)
        base = TwoLevelInt.of(rounding.finish(), grid, scales, w.dtype)
        outliers = watched.finish()
        return Sum.of(base, Sparse.of(outliers, outliers != 0)) if outliers.any() else base

    def _threshold(self, w: Float[Tensor, "out in"], importance: Float[Tensor, " in"]) -> float:
        """The cost above which a weight is an outlier."""
        if self.outlier_threshold is None:
            return float("inf")
        return self.outlier_threshold * float((w.double().square().mean(0) * importance).mean())

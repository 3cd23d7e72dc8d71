"""LoftQ (arXiv 2310.08659): a rounded matrix and a low-rank term, found in turn: where adapters begin."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from decoct.methods.base import LinearMethod, quantize_structure
from decoct.ops.grid import check_grid, fit_grid, quantize_packed, resolve_group_size, stored_scale_dtype
from decoct.ops.low_rank import whitened_low_rank
from decoct.weights import Dense, GroupInt, LowRank, Sum, Weight


@dataclass(frozen=True, slots=True, kw_only=True)
class LoftQ(LinearMethod):
    """Alternate: round what the low-rank term leaves, then take the best low-rank term of what rounding lost.

    Needs no data. A `distill` stage with `train: [corrections]` after it goes on from there, which is LoRA
    fine-tuning as the paper has it.

    Attributes:
        bits: 2 to 8.
        group_size: input features that share a scale, or "channel" (one a row), or "tensor".
        symmetric: grid around zero, without zero points.
        rank: of the term; costs 16·rank·(1/in + 1/out) bits a weight.
        num_steps: alternations; 1: plain rounding and a term for what it loses. The best of them is kept.
    """

    bits: int = 4
    group_size: int | str = 64
    symmetric: bool = True
    rank: int = 16
    num_steps: int = 5

    def __post_init__(self) -> None:
        check_grid(self.bits, self.group_size)
        if min(self.rank, self.num_steps) < 1:
            raise ValueError("rank and num_steps must be at least 1")

    def check(self, shape: tuple[int, int]) -> None:
        """The group size must divide the input features, and the rank fit the matrix."""
        resolve_group_size(self.group_size, shape[1])
        if self.rank > min(shape):
            raise ValueError(f"rank {self.rank} is more than a {shape[0]}x{shape[1]} matrix has; at most {min(shape)}")

    def workspace(self, shape: tuple[int, int]) -> int:
        """Float32 and float64 copies of the matrix, and of the square matrices on either side."""
        return 56 * shape[0] * shape[1] + 32 * shape[1] ** 2 + 24 * min(shape) ** 2 + (1 << 26)

    def operations(self, shape: tuple[int, int]) -> float:
        """In each step products in float64 and an eigendecomposition of the smaller side."""
        each = 200.0 * shape[0] * shape[1] + 8.0 * shape[0] * shape[1] ** 2 + 60.0 * min(shape) ** 3
        return self.num_steps * each

    def compress(self, weight: Weight, stat: None = None) -> Weight:
        """The sum of a rounded matrix and a term; masks and low rank are kept."""
        return quantize_structure(weight, stat, self._dense, "loftq")

    def _dense(self, w: Float[Tensor, "out in"], mask: Bool[Tensor, "out in"] | None, _: Any) -> Weight:
        values = (w if mask is None else torch.where(mask, w, 0)).float()
        rest, found, least = values, None, float("inf")
        for _step in range(self.num_steps):
            rounded = self._round(rest, w.dtype)
            left, right = whitened_low_rank(values - rounded.unpack(torch.float32), None, min(self.rank, *w.shape))
            term = LowRank.of(Dense.of(left.to(w.dtype)), Dense.of(right.to(w.dtype)))
            made = Sum.of(rounded, term)
            lost = float((values - made.unpack(torch.float32)).norm())
            if lost < least:
                found, least = made, lost
            rest = values - term.unpack(torch.float32)
        if found is None:
            raise ValueError("the weights hold NaN or infinite values; the checkpoint is damaged")
        return found

    def _round(self, values: Float[Tensor, "out in"], dtype: torch.dtype) -> GroupInt:
        grid = fit_grid(
            values,
            bits=self.bits,
            group_size=self.group_size,
            symmetric=self.symmetric,
            scale_dtype=stored_scale_dtype(dtype),
        )
        return GroupInt.of_packed(quantize_packed(values, grid), (values.shape[0], values.shape[1]), grid, dtype)

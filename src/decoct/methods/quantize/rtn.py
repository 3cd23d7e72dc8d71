"""RTN, round to nearest: the data-free baseline of every quantization paper (e.g. arXiv 2210.17323, section 5)."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from decoct.methods.base import LinearMethod, quantize_structure
from decoct.ops.grid import check_grid, fit_grid, quantize_packed, resolve_group_size, stored_scale_dtype
from decoct.weights import GroupInt, Weight


@dataclass(frozen=True, slots=True, kw_only=True)
class RTN(LinearMethod):
    """Round every weight to its group's nearest grid point. Needs no data.

    Attributes:
        bits: 2 to 8.
        group_size: input features that share a scale, or "channel" (one a row), or "tensor".
        symmetric: grid around zero, without zero points.
        clip_search: shrink each group's span to where its squared error is least, instead of covering its extremes.
    """

    bits: int = 4
    group_size: int | str = 64
    symmetric: bool = True
    clip_search: bool = False

    def __post_init__(self) -> None:
        check_grid(self.bits, self.group_size)

    def check(self, shape: tuple[int, int]) -> None:
        """The group size must divide the input features."""
        resolve_group_size(self.group_size, shape[1])

    def workspace(self, shape: tuple[int, int]) -> int:
        """The packed codes; the arithmetic runs over a few rows at a time."""
        return shape[0] * shape[1] + (1 << 26)

    def compress(self, weight: Weight, stat: None = None) -> Weight:
        """Quantize; masks and low rank are kept."""
        return quantize_structure(weight, stat, self._dense, "rtn")

    def _dense(self, w: Float[Tensor, "out in"], mask: Bool[Tensor, "out in"] | None, _: Any) -> Weight:
        values = w if mask is None else torch.where(mask, w, 0)
        grid = fit_grid(
            values,
            bits=self.bits,
            group_size=self.group_size,
            symmetric=self.symmetric,
            scale_dtype=stored_scale_dtype(w.dtype),
            search=self.clip_search,
        )
        return GroupInt.of_packed(quantize_packed(values, grid), (w.shape[0], w.shape[1]), grid, w.dtype)

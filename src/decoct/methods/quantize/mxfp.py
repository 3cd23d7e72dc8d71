"""Rounding to small floating-point numbers: MX formats (arXiv 2310.10537), FP8 (arXiv 2209.05433) and NVFP4."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from decoct.methods.base import LinearMethod, quantize_structure
from decoct.ops.float_grid import FORMATS, encode_packed, fit_float_grid
from decoct.ops.grid import resolve_group_size, stored_scale_dtype
from decoct.weights import FloatBlock, Weight


@dataclass(frozen=True, slots=True, kw_only=True)
class MXFP(LinearMethod):
    """Round every weight to a floating-point number of a few bits, scaled for each block. Needs no data.

    Attributes:
        format: "fp8" (E4M3, a 16-bit scale a row), "mxfp8" (E4M3), "mxfp6" (E2M3) or "mxfp4" (E2M1), each with a power
            of two for 32 weights, or "nvfp4" (E2M1, an E4M3 scale for 16 weights and one for the matrix).
        group_size: input features that share a scale, or "channel", or "tensor"; None takes the format's own block,
            which is the only one that other engines know ("fp8" also "tensor").
        search: try neighbouring scales for each block and keep the one with the least squared error; no effect on fp8.
    """

    format: str = "mxfp8"
    group_size: int | str | None = None
    search: bool = True

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"format must be one of {', '.join(FORMATS)}, not {self.format!r}")

    def check(self, shape: tuple[int, int]) -> None:
        """The block must divide the input features."""
        resolve_group_size(self._block, shape[1])

    def workspace(self, shape: tuple[int, int]) -> int:
        """The packed codes; the arithmetic runs over a few rows at a time, unless all share one scale."""
        entries = shape[0] * shape[1]
        return entries * (32 if self._block == "tensor" else 1) + (1 << 26)

    def compress(self, weight: Weight, stat: None = None) -> Weight:
        """Quantize; masks and low rank are kept."""
        return quantize_structure(weight, stat, self._dense, "mxfp")

    @property
    def _block(self) -> int | str:
        return FORMATS[self.format][2] if self.group_size is None else self.group_size

    def _dense(self, w: Float[Tensor, "out in"], mask: Bool[Tensor, "out in"] | None, _: Any) -> Weight:
        values = w if mask is None else torch.where(mask, w, 0)
        element, scale_kind, _ = FORMATS[self.format]
        grid = fit_float_grid(
            values,
            element=element,
            scale_kind=scale_kind,
            block_size=self._block,
            search=self.search,
            scale_dtype=stored_scale_dtype(w.dtype),
        )
        return FloatBlock.of_packed(encode_packed(values, grid), (w.shape[0], w.shape[1]), grid, w.dtype)

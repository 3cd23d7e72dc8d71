"""FloatBlock: floating-point numbers of 4 to 8 bits with a scale for each block of input features."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float, Int, Shaped, UInt8
from torch import Tensor
from typing_extensions import override

from decoct.ops.float_grid import FloatGrid, decode_blocks
from decoct.ops.minifloat import ELEMENTS
from decoct.ops.packing import unpack_bits
from decoct.weights.base import Weight


@dataclass(frozen=True, eq=False, slots=True)
class FloatBlock(Weight):
    """Elements times their block's scale: FP8, MXFP4, MXFP6, MXFP8, NVFP4.

    Attributes:
        codes: the elements of each row as a bit stream, uint8 [out, ceil(in * bits / 8)]; 4-bit ones two a byte, the
            first in the low half.
        scale: [out, blocks], or [1, 1] for one scale in all. uint8: exponents + 127 ("e8m0") or the bits of an E4M3
            number ("e4m3"); or 16-bit floats ("real").
        tensor_scale: float32 [1], a factor of every "e4m3" scale; None for the other kinds.
        element: "e2m1", "e2m3", "e3m2" or "e4m3": bits of exponent and mantissa, beside the sign.
        scale_kind: "e8m0", "e4m3" or "real".
        block_size: input features that share a scale.
    """

    kind: ClassVar[str] = "FloatBlock"
    codes: UInt8[Tensor, "out code_bytes"]
    scale: Shaped[Tensor, "rows blocks"]
    tensor_scale: Float[Tensor, "1"] | None
    element: str
    scale_kind: str
    block_size: int

    @classmethod
    def of_packed(
        cls, packed: UInt8[Tensor, "out code_bytes"], shape: tuple[int, int], grid: FloatGrid, dtype: torch.dtype
    ) -> "FloatBlock":
        """Codes that were rounded to `grid` and packed; `dtype` is what the matrix was before."""
        return cls(
            shape=shape,
            dtype=dtype,
            codes=packed,
            scale=grid.scale,
            tensor_scale=grid.tensor_scale,
            element=grid.element,
            scale_kind=grid.scale_kind,
            block_size=grid.block_size,
        )

    def grid(self) -> FloatGrid:
        """The scales."""
        return FloatGrid(self.scale, self.tensor_scale, self.element, self.scale_kind, self.block_size)

    def unpack_codes(self) -> UInt8[Tensor, "out in"]:
        """The elements' codes, one byte each."""
        return unpack_bits(self.codes, ELEMENTS[self.element].bits, self.shape[1])

    @override
    def unpack(self, dtype: torch.dtype | None = None) -> Float[Tensor, "out in"]:
        return decode_blocks(self.unpack_codes(), self.grid(), dtype or self.dtype)

    @override
    def unpack_rows(self, rows: Int[Tensor, "*n"] | slice, dtype: torch.dtype | None = None) -> Float[Tensor, "*n in"]:
        packed = self.codes[rows]
        lead, width = packed.shape[:-1], self.shape[1]
        codes = unpack_bits(packed.reshape(-1, packed.shape[-1]), ELEMENTS[self.element].bits, width)
        grid = self.grid()
        if grid.scale.shape[0] > 1:
            grid = replace(grid, scale=grid.scale[rows].reshape(-1, grid.scale.shape[1]))
        return decode_blocks(codes, grid, dtype or self.dtype).reshape(*lead, width)

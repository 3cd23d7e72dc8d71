"""GroupInt: integers of 2 to 8 bits with a scale, and perhaps a zero point, for each group of input features."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from typing_extensions import override

from decoct.ops.grid import Grid, dequantize
from decoct.ops.packing import pack_bits, unpack_bits
from decoct.weights.base import Weight


@dataclass(frozen=True, eq=False, slots=True)
class GroupInt(Weight):
    """Codes on a uniform grid: value = (code - zero) * scale.

    Attributes:
        codes: the codes of each row as a bit stream, uint8 [out, ceil(in * bits / 8)].
        scale: [out, groups], or [1, 1] for one scale in all.
        zero: zero points as a bit stream, uint8 [scale rows, ceil(groups * bits / 8)], or as 16-bit floats
            [scale rows, groups] where they are real numbers; None: symmetric, 2**(bits-1).
        bits: 2 to 8.
        group_size: input features that share a scale.
    """

    kind: ClassVar[str] = "GroupInt"
    codes: UInt8[Tensor, "out code_bytes"]
    scale: Float[Tensor, "rows groups"]
    zero: UInt8[Tensor, "rows zero_bytes"] | Float[Tensor, "rows groups"] | None
    bits: int
    group_size: int

    @classmethod
    def of(cls, codes: UInt8[Tensor, "out in"], grid: Grid, dtype: torch.dtype) -> "GroupInt":
        """Pack codes that were rounded to `grid`; `dtype` is what the matrix was before."""
        return cls.of_packed(pack_bits(codes, grid.bits), (codes.shape[0], codes.shape[1]), grid, dtype)

    @classmethod
    def of_packed(
        cls, packed: UInt8[Tensor, "out code_bytes"], shape: tuple[int, int], grid: Grid, dtype: torch.dtype
    ) -> "GroupInt":
        """The same from codes that are packed already."""
        zero = grid.zero
        if zero is not None and not zero.is_floating_point():
            zero = pack_bits(zero, grid.bits)
        return cls(
            shape=shape,
            dtype=dtype,
            codes=packed,
            scale=grid.scale,
            zero=zero,
            bits=grid.bits,
            group_size=grid.group_size,
        )

    @property
    def symmetric(self) -> bool:
        """Whether there are no zero points."""
        return self.zero is None

    def grid(self) -> Grid:
        """Scales and unpacked zero points."""
        zero = self.zero
        if zero is not None and not zero.is_floating_point():
            zero = unpack_bits(zero, self.bits, self.scale.shape[1])
        return Grid(self.scale, zero, self.bits, self.group_size)

    def unpack_codes(self) -> UInt8[Tensor, "out in"]:
        """The unsigned codes, one byte each."""
        return unpack_bits(self.codes, self.bits, self.shape[1])

    @override
    def unpack(self, dtype: torch.dtype | None = None) -> Float[Tensor, "out in"]:
        return dequantize(self.unpack_codes(), self.grid(), dtype or self.dtype)

    @override
    def unpack_rows(self, rows: Int[Tensor, "*n"] | slice, dtype: torch.dtype | None = None) -> Float[Tensor, "*n in"]:
        packed = self.codes[rows]
        lead, width = packed.shape[:-1], self.shape[1]
        codes = unpack_bits(packed.reshape(-1, packed.shape[-1]), self.bits, width)
        grid = self.grid()
        if grid.scale.shape[0] > 1:
            groups = grid.scale.shape[1]
            zero = None if grid.zero is None else grid.zero[rows].reshape(-1, groups)
            grid = Grid(grid.scale[rows].reshape(-1, groups), zero, grid.bits, grid.group_size)
        return dequantize(codes, grid, dtype or self.dtype).reshape(*lead, width)

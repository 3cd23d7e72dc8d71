"""TwoLevelInt: integers in small groups, whose scales are themselves integers of a few bits (SpQR's bilevel scheme)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from typing_extensions import override

from decoct.ops.grid import Grid, dequantize
from decoct.ops.packing import pack_bits, unpack_bits
from decoct.ops.two_level import Scales
from decoct.weights.base import Weight


@dataclass(frozen=True, eq=False, slots=True)
class TwoLevelInt(Weight):
    """As GroupInt, value = (code - zero) * scale, with scale = base + scale_code * step.

    `base` and `step` serve `rows_per_block` rows of one group of input features. With groups of 16 features, blocks of
    16 rows and scale codes of 3 bits, a scale costs 3/16 + 32/256 bits a weight instead of 1.

    Attributes:
        codes: the codes of each row as a bit stream, uint8 [out, ceil(in * bits / 8)].
        scale_codes: uint8 [out, ceil(groups * scale_bits / 8)].
        base: 16 bits [ceil(out / rows_per_block), groups].
        step: as `base`.
        zero: zero points as a bit stream, uint8 [out, ceil(groups * bits / 8)].
        bits: 2 to 8.
        scale_bits: 1 to 8.
        group_size: input features that share a scale.
        rows_per_block: rows that share base and step.
    """

    kind: ClassVar[str] = "TwoLevelInt"
    codes: UInt8[Tensor, "out code_bytes"]
    scale_codes: UInt8[Tensor, "out scale_bytes"]
    base: Float[Tensor, "blocks groups"]
    step: Float[Tensor, "blocks groups"]
    zero: UInt8[Tensor, "out zero_bytes"]
    bits: int
    scale_bits: int
    group_size: int
    rows_per_block: int

    @classmethod
    def of(cls, codes: UInt8[Tensor, "out in"], grid: Grid, scales: Scales, dtype: torch.dtype) -> "TwoLevelInt":
        """Pack codes that were rounded to `grid`, whose scales are those of `scales`.

        Args:
            codes: unsigned.
            grid: with zero points.
            scales: how its scales are made.
            dtype: what the matrix was before.
        """
        assert grid.zero is not None
        return cls(
            shape=(codes.shape[0], codes.shape[1]),
            dtype=dtype,
            codes=pack_bits(codes, grid.bits),
            scale_codes=pack_bits(scales.codes, scales.bits),
            base=scales.base,
            step=scales.step,
            zero=pack_bits(grid.zero, grid.bits),
            bits=grid.bits,
            scale_bits=scales.bits,
            group_size=grid.group_size,
            rows_per_block=scales.rows_per_block,
        )

    def scales(self) -> Scales:
        """The scales' own codes, unpacked."""
        codes = unpack_bits(self.scale_codes, self.scale_bits, self.base.shape[1])
        return Scales(codes, self.base, self.step, self.scale_bits, self.rows_per_block)

    def grid(self) -> Grid:
        """Scales, float32, and zero points."""
        zero = unpack_bits(self.zero, self.bits, self.base.shape[1])
        return Grid(self.scales().values(), zero, self.bits, self.group_size)

    def unpack_codes(self) -> UInt8[Tensor, "out in"]:
        """The unsigned codes, one byte each."""
        return unpack_bits(self.codes, self.bits, self.shape[1])

    @override
    def unpack(self, dtype: torch.dtype | None = None) -> Float[Tensor, "out in"]:
        return dequantize(self.unpack_codes(), self.grid(), dtype or self.dtype)

    @override
    def unpack_rows(self, rows: Int[Tensor, "*n"] | slice, dtype: torch.dtype | None = None) -> Float[Tensor, "*n in"]:
        packed, numbers = self.codes[rows], torch.arange(self.shape[0], device=self.codes.device)[rows].reshape(-1)
        codes = unpack_bits(packed.reshape(-1, packed.shape[-1]), self.bits, self.shape[1])
        zero, scale_codes = (
            unpack_bits(stream[numbers], bits, self.base.shape[1])
            for stream, bits in ((self.zero, self.bits), (self.scale_codes, self.scale_bits))
        )
        block = numbers // self.rows_per_block
        scales = Scales(scale_codes, self.base[block], self.step[block], self.scale_bits, rows_per_block=1)
        grid = Grid(scales.values(), zero, self.bits, self.group_size)
        return dequantize(codes, grid, dtype or self.dtype).reshape(*packed.shape[:-1], self.shape[1])

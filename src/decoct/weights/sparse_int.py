"""SparseInt: quantized values at a few entries, and where they are; everything else is zero and costs no code."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from typing_extensions import override

from decoct.ops.gaps import pack_positions, unpack_positions
from decoct.ops.packing import pack_bits, pack_mask, unpack_bits, unpack_mask
from decoct.weights.base import Weight


@dataclass(frozen=True, eq=False, slots=True)
class SparseInt(Weight):
    """At each stored entry value = (code - 2**(bits-1)) * scale. `Masked(GroupInt)` stores a code for every entry.

    Positions are a bitmap or, where that is smaller, the runs between entries in row order (`ops.gaps`).

    Attributes:
        codes: of the stored entries in row order, one bit stream.
        scale: [out, groups].
        bitmap: uint8 [out, ceil(in / 8)], or None.
        gaps: the stream of runs, or None.
        bits: of each code, 2 to 8.
        group_size: consecutive input features that share a scale.
        count: stored entries.
        gap_bits: of each run's code; 0 with a bitmap.
        num_gaps: codes in the stream of runs; 0 with a bitmap.
    """

    kind: ClassVar[str] = "SparseInt"
    codes: UInt8[Tensor, " code_bytes"]
    scale: Float[Tensor, "out groups"]
    bitmap: UInt8[Tensor, "out mask_bytes"] | None
    gaps: UInt8[Tensor, " gap_bytes"] | None
    bits: int
    group_size: int
    count: int
    gap_bits: int
    num_gaps: int

    @classmethod
    def of(
        cls,
        codes: UInt8[Tensor, "out in"],
        stored: Bool[Tensor, "out in"],
        scale: Float[Tensor, "out groups"],
        bits: int,
        dtype: torch.dtype,
    ) -> "SparseInt":
        """Keep the codes where `stored` is True; `scale` is stored as it is.

        Args:
            codes: unsigned, 2**(bits-1) is zero.
            stored: entries to keep.
            scale: the groups divide the input features evenly.
            bits: of each code.
            dtype: what the matrix was before.
        """
        rows, cols = codes.shape
        kept = codes[stored]
        bitmap = pack_mask(stored)
        gaps, gap_bits, num_gaps = pack_positions(stored.flatten().nonzero().squeeze(1))
        indexed = gaps.nbytes < bitmap.nbytes
        return cls(
            shape=(rows, cols),
            dtype=dtype,
            codes=pack_bits(kept, bits),
            scale=scale,
            bitmap=None if indexed else bitmap,
            gaps=gaps if indexed else None,
            bits=bits,
            group_size=cols // scale.shape[1],
            count=kept.numel(),
            gap_bits=gap_bits if indexed else 0,
            num_gaps=num_gaps if indexed else 0,
        )

    @override
    def unpack(self, dtype: torch.dtype | None = None) -> Float[Tensor, "out in"]:
        positions = self._positions()
        out = torch.zeros(self.shape, dtype=dtype or self.dtype, device=self.codes.device)
        values = self._steps() * self.scale.flatten()[self._scale_index(positions)].float()
        out.view(-1)[positions] = values.to(out.dtype)
        return out

    def survivors(self) -> Bool[Tensor, "out in"]:
        """True where an entry is stored."""
        stored = torch.zeros(self.shape, dtype=torch.bool, device=self.codes.device)
        stored.view(-1)[self._positions()] = True
        return stored

    def pull_back(self, gradient: Float[Tensor, "out in"]) -> dict[str, Tensor]:
        """The gradient of each scale gathers (code - zero)·gradient over its stored entries."""
        positions = self._positions()
        terms = self._steps() * gradient.flatten()[positions]
        total = torch.zeros(self.scale.numel(), dtype=torch.float32, device=self.codes.device)
        return {"scale": total.index_add_(0, self._scale_index(positions), terms).reshape(self.scale.shape)}

    def _positions(self) -> Int[Tensor, " count"]:
        """Of the stored entries, in the matrix read row by row."""
        if self.bitmap is not None:
            return unpack_mask(self.bitmap, self.shape[1]).flatten().nonzero().squeeze(1)
        assert self.gaps is not None
        return unpack_positions(self.gaps, self.gap_bits, self.num_gaps)

    def _steps(self) -> Float[Tensor, " count"]:
        """Codes counted from zero."""
        return unpack_bits(self.codes, self.bits, self.count).float() - 2.0 ** (self.bits - 1)

    def _scale_index(self, positions: Tensor) -> Int[Tensor, " count"]:
        """Which scale each stored entry has, in the flattened table: groups divide rows evenly."""
        return positions // self.group_size

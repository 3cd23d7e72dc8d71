"""Sparse: only the entries that are not zero, and where they are."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int, Shaped, UInt8
from torch import Tensor
from typing_extensions import override

from decoct.ops.packing import pack_mask, packed_width, unpack_mask
from decoct.weights.base import Weight


@dataclass(frozen=True, eq=False, slots=True)
class Sparse(Weight):
    """Surviving values in row order, with a bitmap or, when few survive, their column numbers.

    Attributes:
        values: [survivors], any float dtype.
        counts: survivors of each row, int32 [out].
        bitmap: uint8 [out, ceil(in / 8)], or None.
        columns: the column of each survivor, int32 [survivors] (int16 where in <= 32768), or None.
    """

    kind: ClassVar[str] = "Sparse"
    values: Float[Tensor, " survivors"]
    counts: Int[Tensor, " out"] | None
    bitmap: UInt8[Tensor, "out mask_bytes"] | None
    columns: Int[Tensor, " survivors"] | None

    @classmethod
    def of(cls, matrix: Float[Tensor, "out in"], survivors: Bool[Tensor, "out in"]) -> "Sparse":
        """Keep `matrix` where `survivors` is True, in whichever of the two encodings is smaller."""
        rows, cols = matrix.shape
        counts = survivors.sum(1, dtype=torch.int32)
        index_dtype = torch.int16 if cols <= 2**15 else torch.int32
        total = int(counts.sum())
        indexed_bytes = total * index_dtype.itemsize + counts.nbytes
        indexed = indexed_bytes < rows * packed_width(cols, 1)
        return cls(
            shape=(rows, cols),
            dtype=matrix.dtype,
            values=matrix[survivors],
            counts=counts if indexed else None,
            bitmap=None if indexed else pack_mask(survivors),
            columns=survivors.nonzero()[:, 1].to(index_dtype) if indexed else None,
        )

    def survivors(self) -> Bool[Tensor, "out in"]:
        """True where an entry is stored."""
        if self.bitmap is not None:
            return unpack_mask(self.bitmap, self.shape[1])
        assert self.columns is not None
        mask = torch.zeros(self.shape, dtype=torch.bool, device=self.values.device)
        mask[self._row_numbers(), self.columns.long()] = True
        return mask

    @override
    def unpack(self, dtype: torch.dtype | None = None) -> Float[Tensor, "out in"]:
        out = torch.zeros(self.shape, dtype=dtype or self.dtype, device=self.values.device)
        values = self.values.to(out.dtype)
        if self.columns is not None:
            out[self._row_numbers(), self.columns.long()] = values
        else:
            out.masked_scatter_(self.survivors(), values)
        return out

    def _row_numbers(self) -> Shaped[Tensor, " survivors"]:
        assert self.counts is not None
        rows = torch.arange(self.shape[0], device=self.values.device)
        return rows.repeat_interleave(self.counts.long())

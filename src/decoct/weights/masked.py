"""Masked: another weight, of which some entries are exactly zero and must stay so."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from typing_extensions import override

from decoct.ops.packing import pack_mask, unpack_mask
from decoct.weights.base import Weight


@dataclass(frozen=True, eq=False, slots=True)
class Masked(Weight):
    """`inner` with a bitmap of the entries that survive; the bitmap costs one bit a weight and is counted.

    Attributes:
        inner: any weight of the same shape.
        mask: bitmap, uint8 [out, ceil(in / 8)]; a set bit survives.
    """

    kind: ClassVar[str] = "Masked"
    inner: Weight
    mask: UInt8[Tensor, "out mask_bytes"]

    @classmethod
    def of(cls, inner: Weight, mask: Bool[Tensor, "out in"]) -> "Masked":
        """Attach a mask (True survives)."""
        return cls(inner.shape, inner.dtype, inner, pack_mask(mask))

    def survivors(self) -> Bool[Tensor, "out in"]:
        """True where an entry may be other than zero."""
        return unpack_mask(self.mask, self.shape[1])

    @override
    def unpack(self, dtype: torch.dtype | None = None) -> Float[Tensor, "out in"]:
        return self.inner.unpack(dtype or self.dtype) * self.survivors()

    @override
    def unpack_rows(self, rows: Int[Tensor, "*n"] | slice, dtype: torch.dtype | None = None) -> Float[Tensor, "*n in"]:
        return self.inner.unpack_rows(rows, dtype or self.dtype) * unpack_mask(self.mask[rows], self.shape[1])

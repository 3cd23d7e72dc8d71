"""Padded: the upper left corner of a matrix, the rest of which is zero: what is left where blocks differ in width."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from decoct.weights.base import Weight


@dataclass(frozen=True, eq=False, slots=True)
class Padded(Weight):
    """`inner` where it reaches, zero beside and below it; nothing is stored of the zeros.

    Attributes:
        inner: any weight with no more rows and columns.
    """

    kind: ClassVar[str] = "Padded"
    inner: Weight

    @classmethod
    def of(cls, inner: Weight, shape: tuple[int, int]) -> "Padded":
        """Put a weight into the corner of a matrix of this shape.

        Raises:
            ValueError: it is larger.
        """
        if any(has > room for has, room in zip(inner.shape, shape, strict=True)):
            raise ValueError(f"a matrix of {list(inner.shape)} does not fit into one of {list(shape)}")
        return cls(shape, inner.dtype, inner)

    @override
    def unpack(self, dtype: torch.dtype | None = None) -> Float[Tensor, "out in"]:
        corner = self.inner.unpack(dtype or self.dtype)
        return _padded(_padded(corner, 1, self.shape[1]), 0, self.shape[0])

    @override
    def unpack_rows(self, rows: Int[Tensor, "*n"] | slice, dtype: torch.dtype | None = None) -> Float[Tensor, "*n in"]:
        if isinstance(rows, slice):
            rows = torch.arange(self.shape[0], device=next(iter(self.tensors().values())).device)[rows]
        rows = rows % self.shape[0]  # -1 is the last one
        there = rows < self.inner.shape[0]
        corner = self.inner.unpack_rows(rows.clamp(max=self.inner.shape[0] - 1), dtype or self.dtype)
        return _padded(corner.where(there.unsqueeze(-1), 0), -1, self.shape[1])

    @override
    def apply(self, x: Float[Tensor, "*tokens in"]) -> Float[Tensor, "*tokens out"]:
        return _padded(self.inner.apply(x[..., : self.inner.shape[1]]), -1, self.shape[0])


def _padded(tensor: Tensor, dim: int, size: int) -> Tensor:
    """Zeros behind the end of a dimension."""
    missing = size - tensor.shape[dim]
    if not missing:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)

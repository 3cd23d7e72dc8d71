"""Stacked: weights one above the other, where groups of a matrix's rows were compressed apart."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from decoct.weights.base import Weight
from decoct.weights.codebook import Codebook
from decoct.weights.group_int import GroupInt
from decoct.weights.masked import Masked
from decoct.weights.sparse import Sparse


@dataclass(frozen=True, eq=False, slots=True)
class Stacked(Weight):
    """The rows of its parts, one part after another.

    Attributes:
        parts: two or more weights of one width.
    """

    kind: ClassVar[str] = "Stacked"
    parts: tuple[Weight, ...]

    @classmethod
    def of(cls, *parts: Weight) -> "Stacked":
        """Put weights above each other.

        Raises:
            ValueError: fewer than two parts, or widths that differ.
        """
        if len(parts) < 2 or any(part.shape[1] != parts[0].shape[1] for part in parts):
            raise ValueError(f"two or more weights of one width can be stacked, not {[list(p.shape) for p in parts]}")
        out = sum(part.shape[0] for part in parts)
        return cls((out, parts[0].shape[1]), parts[0].dtype, parts)

    @override
    def apply(self, x: Float[Tensor, "*tokens in"]) -> Float[Tensor, "*tokens out"]:
        if not self.quantizes_inputs:
            return torch.nn.functional.linear(x, self.unpack(x.dtype))
        return torch.cat([part.apply(x) for part in self.parts], -1)

    @override
    def unpack(self, dtype: torch.dtype | None = None) -> Float[Tensor, "out in"]:
        return torch.cat([part.unpack(dtype or self.dtype) for part in self.parts])

    def split(self, matrix: Float[Tensor, "out in"]) -> list[Float[Tensor, "rows in"]]:
        """The rows of another matrix of this shape, part by part."""
        return list(matrix.split_with_sizes([part.shape[0] for part in self.parts]))


def stack(parts: Sequence[Weight]) -> Weight:
    """Weights one above the other: one weight of their kind where it stores rows apart anyway, else `Stacked`.

    Raises:
        ValueError: no weights, or widths that differ.
    """
    if len(parts) == 1:
        return parts[0]
    whole = Stacked.of(*parts)
    masked = [part for part in parts if isinstance(part, Masked)]
    if len(masked) == len(parts):
        inner = stack([part.inner for part in masked])
        return Masked(whole.shape, whole.dtype, inner, torch.cat([part.mask for part in masked]))
    ints = [part for part in parts if isinstance(part, GroupInt)]
    if len(ints) == len(parts) and _one_grid(ints):
        return _stacked_ints(ints, whole.shape)
    sparse = [part for part in parts if isinstance(part, Sparse)]
    if len(sparse) == len(parts) and len({part.bitmap is None for part in sparse}) == 1:
        return Sparse.of(
            torch.cat([part.unpack() for part in sparse]), torch.cat([part.survivors() for part in sparse])
        )
    books = [part for part in parts if isinstance(part, Codebook)]
    if len(books) == len(parts) and len({(p.bits, p.d, p.rows_per_table, p.table.dtype) for p in books}) == 1:
        if books[0].rows_per_table > 1:
            return whole
        codes, tables = (torch.cat(each) for each in zip(*((p.codes, p.table) for p in books), strict=True))
        return replace(books[0], shape=whole.shape, codes=codes, table=tables)
    return whole


def _one_grid(parts: Sequence[GroupInt]) -> bool:
    """Whether the parts have the same settings, and scales for each row."""
    zeros = {None if part.zero is None else part.zero.dtype for part in parts}
    settings = {(part.bits, part.group_size, part.scale.dtype) for part in parts}
    return len(settings) == len(zeros) == 1 and all(part.scale.shape[0] == part.shape[0] for part in parts)


def _stacked_ints(parts: Sequence[GroupInt], shape: tuple[int, int]) -> GroupInt:
    zeros = [part.zero for part in parts if part.zero is not None]
    return replace(
        parts[0],
        shape=shape,
        codes=torch.cat([part.codes for part in parts]),
        scale=torch.cat([part.scale for part in parts]),
        zero=torch.cat(zeros) if zeros else None,
    )

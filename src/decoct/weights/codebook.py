"""Codebook: codes of 1 to 8 bits into tables of values, or of short vectors of neighbouring entries."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from typing_extensions import override

from decoct.ops.codebook import lookup
from decoct.ops.packing import pack_bits, unpack_bits
from decoct.ops.parallel import each_piece
from decoct.weights.base import Weight


@dataclass(frozen=True, eq=False, slots=True)
class Codebook(Weight):
    """Each code stands for `d` neighbouring entries of a row: those that its row's table lists under it.

    Attributes:
        codes: the codes of each row as a bit stream, uint8 [out, ceil(in / d * bits / 8)].
        table: [tables, 2**bits, d], 16 bits a value.
        bits: 1 to 8.
        d: entries of a row that one code stands for, 1 to 8.
        rows_per_table: consecutive rows that share a table: 1 for one each, `out` for one in all. The last table may
            have fewer.
    """

    kind: ClassVar[str] = "Codebook"
    codes: UInt8[Tensor, "out code_bytes"]
    table: Float[Tensor, "tables entries d"]
    bits: int
    d: int
    rows_per_table: int

    @classmethod
    def of(
        cls, codes: UInt8[Tensor, "out n"], table: Float[Tensor, "tables entries d"], dtype: torch.dtype
    ) -> "Codebook":
        """Pack codes; the rows are shared out evenly among the tables.

        Args:
            codes: below `entries`.
            table: 2 to 256 entries, a power of two, of 1 to 8 values.
            dtype: what the matrix was before.

        Raises:
            ValueError: a table of other size, or more tables than rows.
        """
        tables, entries, d = table.shape
        bits = entries.bit_length() - 1
        if not 1 <= bits <= 8 or entries != 2**bits or not 1 <= d <= 8:
            raise ValueError(f"a table has 2 to 256 entries, a power of two, of 1 to 8 values, not {entries} of {d}")
        out = codes.shape[0]
        rows_per_table = -(-out // tables)
        if -(-out // rows_per_table) != tables:
            raise ValueError(f"{out} rows cannot be shared out among {tables} tables")
        shape = (out, codes.shape[1] * d)
        return cls(shape, dtype, pack_bits(codes, bits), table, bits, d, rows_per_table)

    def unpack_codes(self) -> UInt8[Tensor, "out n"]:
        """The codes, one byte each."""
        return unpack_bits(self.codes, self.bits, self.shape[1] // self.d)

    def table_of(self, rows: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        """The number of each row's table."""
        return rows // self.rows_per_table

    @override
    def unpack(self, dtype: torch.dtype | None = None) -> Float[Tensor, "out in"]:
        out, cols = self.shape
        found = torch.empty(out, cols, dtype=dtype or self.dtype, device=self.codes.device)
        numbers = torch.arange(out, device=self.codes.device)

        def work(part: slice) -> None:
            found[part] = self._values(self.codes[part], numbers[part], found.dtype)

        each_piece(work, out, cols, self.codes.device)
        return found

    @override
    def unpack_rows(self, rows: Int[Tensor, "*n"] | slice, dtype: torch.dtype | None = None) -> Float[Tensor, "*n in"]:
        packed, numbers = self.codes[rows], torch.arange(self.shape[0], device=self.codes.device)[rows]
        values = self._values(packed.reshape(-1, packed.shape[-1]), numbers.reshape(-1), dtype or self.dtype)
        return values.reshape(*packed.shape[:-1], self.shape[1])

    def _values(self, packed: Tensor, numbers: Tensor, dtype: torch.dtype) -> Tensor:
        codes = unpack_bits(packed, self.bits, self.shape[1] // self.d)
        return lookup(codes, self.table[self.table_of(numbers)].to(dtype))

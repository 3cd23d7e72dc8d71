"""Additive: codes of 1 to 8 bits into several codebooks, whose entries for the same place are added."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from typing_extensions import override

from decoct.ops.additive import collect, decode
from decoct.ops.packing import pack_bits, unpack_bits
from decoct.ops.parallel import each_piece
from decoct.weights.base import Weight


@dataclass(frozen=True, eq=False, slots=True)
class Additive(Weight):
    """`d` neighbouring entries of a row = its scale · Σ over codebooks of the vector under its code (arXiv 2401.06118).

    Attributes:
        codes: for each codebook and row a bit stream, uint8 [books, out, ceil(in / d * bits / 8)].
        codebooks: [books, 2**bits, d], 16 bits a value.
        scale: [out, 1], 16 bits.
        bits: of a code, 1 to 8.
    """

    kind: ClassVar[str] = "Additive"
    codes: UInt8[Tensor, "books out code_bytes"]
    codebooks: Float[Tensor, "books entries d"]
    scale: Float[Tensor, "out 1"]
    bits: int

    @classmethod
    def of(
        cls,
        codes: UInt8[Tensor, "books out n"],
        codebooks: Float[Tensor, "books entries d"],
        scale: Float[Tensor, "out 1"],
        dtype: torch.dtype,
    ) -> "Additive":
        """Pack codes.

        Args:
            codes: below `entries`.
            codebooks: of 2 to 256 entries, a power of two.
            scale: of each row.
            dtype: what the matrix was before.

        Raises:
            ValueError: codebooks of other size, or not as many as there are codes for.
        """
        books, entries, d = codebooks.shape
        bits = entries.bit_length() - 1
        if not 1 <= bits <= 8 or entries != 2**bits or books != codes.shape[0]:
            raise ValueError(
                f"{codes.shape[0]} codes a vector need as many codebooks of 2 to 256 entries, a power of two, "
                f"not {books} of {entries}"
            )
        return cls((codes.shape[1], codes.shape[2] * d), dtype, pack_bits(codes, bits), codebooks, scale, bits)

    def unpack_codes(self) -> UInt8[Tensor, "books out n"]:
        """The codes, one byte each."""
        return unpack_bits(self.codes, self.bits, self.shape[1] // self.codebooks.shape[2])

    @override
    def unpack(self, dtype: torch.dtype | None = None) -> Float[Tensor, "out in"]:
        out, cols = self.shape
        found = torch.empty(out, cols, dtype=dtype or self.dtype, device=self.codes.device)

        def work(part: slice) -> None:
            found[part] = self._values(part)

        each_piece(work, out, cols, self.codes.device)
        return found

    @override
    def unpack_rows(self, rows: Int[Tensor, "*n"] | slice, dtype: torch.dtype | None = None) -> Float[Tensor, "*n in"]:
        numbers = torch.arange(self.shape[0], device=self.codes.device)[rows]
        return self._values(numbers.reshape(-1)).to(dtype or self.dtype).reshape(*numbers.shape, self.shape[1])

    def pull_back(self, g: Float[Tensor, "out in"]) -> dict[str, Tensor]:
        """Gradients of codebooks and scales, float32, given that of the matrix."""
        codes = self.unpack_codes()
        return {
            "codebooks": collect(codes, g * self.scale.float(), self.codebooks.shape[1]),
            "scale": decode(codes, self.codebooks.float()).mul_(g).sum(1, keepdim=True),
        }

    def _values(self, rows: Int[Tensor, " n"] | slice) -> Float[Tensor, "n in"]:
        codes = unpack_bits(self.codes[:, rows], self.bits, self.shape[1] // self.codebooks.shape[2])
        return decode(codes, self.codebooks.float()).mul_(self.scale[rows].float())

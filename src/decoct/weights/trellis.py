"""Trellis: each weight is a state of a bit-shift trellis, so a few bits a weight choose among thousands of values."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from typing_extensions import override

from decoct.ops.packing import pack_bits, unpack_bits
from decoct.ops.trellis import check_trellis, decode
from decoct.weights.base import Weight

_LENGTH = 128  # of a sequence, about
_MULTIPLE = 8  # whole bytes, whatever the bits


@dataclass(frozen=True, eq=False, slots=True)
class Trellis(Weight):
    """value = scale · table[state]; the states are windows of a stream of digits (arXiv 2406.11235).

    Columns are taken in stripes of `stripe`; a stripe's entries, column after column, are cut into sequences of equal
    length, each a ring of digits of its own.

    Attributes:
        codes: the digits as bit streams, uint8 [stripes, sequences, length * bits / 8].
        scale: [1, 1], or one for each row [out, 1].
        bits: of a digit: what a weight costs.
        state_bits: of a state; there are 2**state_bits values.
        stripe: columns that share sequences.
    """

    kind: ClassVar[str] = "Trellis"
    codes: UInt8[Tensor, "stripes sequences code_bytes"]
    scale: Float[Tensor, "rows 1"]
    bits: int
    state_bits: int
    stripe: int

    @classmethod
    def of(
        cls,
        digits: UInt8[Tensor, "stripes sequences length"],
        shape: tuple[int, int],
        scale: Float[Tensor, "rows 1"],
        dtype: torch.dtype,
        *,
        bits: int,
        state_bits: int,
        stripe: int,
    ) -> "Trellis":
        """Pack digits; each stripe's are laid out as `sequences_of` says."""
        check_trellis(bits, state_bits)
        assert digits.shape == (-(-shape[1] // stripe), *sequences_of(shape[0] * stripe))
        return cls(shape, dtype, pack_bits(digits, bits), scale, bits, state_bits, stripe)

    def unit(self) -> Float[Tensor, "out in"]:
        """The matrix before it is scaled, float32."""
        rows, cols = self.shape
        _, length = sequences_of(rows * self.stripe)
        values = decode(unpack_bits(self.codes, self.bits, length), self.bits, self.state_bits)
        columns = values.flatten(1)[:, : rows * self.stripe].reshape(-1, rows)
        return columns[:cols].T.contiguous()

    @override
    def unpack(self, dtype: torch.dtype | None = None) -> Float[Tensor, "out in"]:
        return (self.unit() * self.scale.float()).to(dtype or self.dtype)


def sequences_of(entries: int) -> tuple[int, int]:
    """How many sequences hold so many entries of a stripe, and how long they are; the last may end in padding."""
    count = max(1, round(entries / _LENGTH))
    shortest = -(-entries // count)
    return count, max(2 * _MULTIPLE, -(-shortest // _MULTIPLE) * _MULTIPLE)

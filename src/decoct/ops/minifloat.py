"""Floating-point numbers of four to eight bits, as the OCP's FP8 and microscaling (MX) specifications define them.

A code holds the sign in its highest bit, then the exponent, then the mantissa. Codes of positive numbers are in the
order of the numbers, so a number is rounded by counting the steps of its binade.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

_EXPONENT_BITS = 23  # where float32's exponent begins, and
_BIAS = 127  # what is added to it


@dataclass(frozen=True, slots=True)
class MiniFloat:
    """One way to spend a few bits on a number.

    Attributes:
        exponent: bits of the exponent.
        mantissa: bits after the binary point; numbers below the smallest exponent are subnormal.
        top: code of the largest finite number (E4M3 keeps its last code for NaN).
    """

    exponent: int
    mantissa: int
    top: int

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return 1 + self.exponent + self.mantissa

    @property
    def lowest(self) -> int:
        """The smallest exponent: that of the subnormal numbers and of the first normal ones."""
        return 2 - (1 << (self.exponent - 1))

    @property
    def highest(self) -> int:
        """The exponent of the largest number."""
        return self.lowest + (self.top >> self.mantissa) - 1

    @property
    def largest(self) -> float:
        """The largest finite number."""
        digits = (1 << self.mantissa) + self.top % (1 << self.mantissa)
        return math.ldexp(digits, self.highest - self.mantissa)


ELEMENTS = {
    "e2m1": MiniFloat(exponent=2, mantissa=1, top=7),
    "e2m3": MiniFloat(exponent=2, mantissa=3, top=31),
    "e3m2": MiniFloat(exponent=3, mantissa=2, top=31),
    "e4m3": MiniFloat(exponent=4, mantissa=3, top=126),
}


def encode(x: Float[Tensor, "*shape"], kind: MiniFloat) -> UInt8[Tensor, "*shape"]:
    """Codes of the nearest numbers, ties to the even code; what is too large becomes the largest.

    Args:
        x: float32, finite.
        kind: the format.
    """
    magnitude = x.abs().clamp_(max=kind.largest)
    exponent, step = _binade(magnitude, kind)
    codes = magnitude.div_(step).round_().to(torch.int32)
    codes.add_((exponent - kind.lowest) << kind.mantissa)
    return codes.bitwise_or_(torch.signbit(x).to(torch.int32) << (kind.bits - 1)).to(torch.uint8)


def decode(codes: UInt8[Tensor, "*shape"], kind: MiniFloat) -> Float[Tensor, "*shape"]:
    """The numbers that codes stand for, float32; exact."""
    return _table(kind).to(codes.device)[codes.int()]


def rounded(x: Float[Tensor, "*shape"], kind: MiniFloat) -> Float[Tensor, "*shape"]:
    """`decode(encode(x, kind), kind)` without the codes."""
    _, step = _binade(x.abs(), kind)
    return x.div(step).round_().mul_(step).clamp_(-kind.largest, kind.largest)


def power_of_two(exponent: Tensor) -> Float[Tensor, "*shape"]:
    """2**exponent, float32, exact; for int32 exponents from -126 to 127."""
    return ((exponent + _BIAS) << _EXPONENT_BITS).view(torch.float32)


def exponent_of(magnitude: Float[Tensor, "*shape"]) -> Tensor:
    """floor(log2(magnitude)), int32, exact; for float32 from the smallest normal number on."""
    return (magnitude.view(torch.int32) >> _EXPONENT_BITS) - _BIAS


def _binade(magnitude: Tensor, kind: MiniFloat) -> tuple[Tensor, Tensor]:
    """Each number's exponent within the format, int32, and the distance of neighbouring numbers there, float32."""
    exponent = exponent_of(magnitude.contiguous()).clamp_(kind.lowest, kind.highest)
    return exponent, power_of_two(exponent - kind.mantissa)


def _table(kind: MiniFloat) -> Tensor:
    """Every code's number; codes above the largest finite one are NaN."""
    codes = torch.arange(1 << (kind.bits - 1), dtype=torch.int32)
    field, fraction = codes >> kind.mantissa, codes % (1 << kind.mantissa)
    implied = (field > 0).int() << kind.mantissa
    exponent = field.clamp(min=1) - 1 + kind.lowest
    numbers = (implied + fraction) * power_of_two(exponent - kind.mantissa)
    numbers = numbers.masked_fill(codes > kind.top, torch.nan)
    return torch.cat([numbers, -numbers])

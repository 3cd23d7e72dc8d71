"""Levels between a group's minimum and maximum, from KIVI's formula, one number at a time in plain float64.

Q(x) = round((x - z) / s), z = min x, s = (max x - min x) / (2^bits - 1), with z and s as float16 holds them.
"""

import math
import struct


def half(x: float) -> float:
    """The nearest float16; what is too large becomes the largest."""
    return float(struct.unpack("e", struct.pack("e", max(-65504.0, min(65504.0, x))))[0])


def back(group: list[float], bits: int) -> list[float]:
    """A group's numbers after packing and unpacking."""
    low = half(min(group))
    step = max(half((min(max(group), 65504.0) - low) / (2**bits - 1)), 2.0**-24)
    found = []
    for x in group:
        code = (x - low) / step
        whole = math.floor(code)
        up = code - whole > 0.5 or (code - whole == 0.5 and whole % 2 == 1)
        found.append(low + step * max(0, min(2**bits - 1, whole + up)))
    return found

"""Small floats and MX blocks number by number, from the OCP specifications' definitions, in Python's float64.

(-1)^S · 2^(E - bias) · (1 + M/2^m), or (-1)^S · 2^(1 - bias) · M/2^m where E = 0; bias = 2^(e-1) - 1. E4M3 has no
infinity; its last code, S.1111.111, is NaN. E2M1, E2M3 and E3M2 have neither.
"""

import math

LAYOUT = {"e2m1": (2, 1), "e2m3": (2, 3), "e3m2": (3, 2), "e4m3": (4, 3)}
LARGEST = {"e2m1": 6.0, "e2m3": 7.5, "e3m2": 28.0, "e4m3": 448.0}  # as the specifications' tables give them
HIGHEST_EXPONENT = {"e2m1": 2, "e2m3": 2, "e3m2": 4, "e4m3": 8}


def number(code: int, element: str) -> float:
    """What a code stands for."""
    e, m = LAYOUT[element]
    sign, exponent, mantissa = code >> (e + m), code >> m & (2**e - 1), code & (2**m - 1)
    if element == "e4m3" and (exponent, mantissa) == (15, 7):
        return math.nan
    bias = 2 ** (e - 1) - 1
    size = 2.0 ** (1 - bias) * mantissa / 2**m if exponent == 0 else 2.0 ** (exponent - bias) * (1 + mantissa / 2**m)
    return -size if sign else size


def nearest(x: float, element: str) -> int:
    """The code of the nearest number: ties to the even code, overflow to the largest."""
    bits = sum(LAYOUT[element])
    codes = [code for code in range(2**bits) if not math.isnan(number(code, element))]
    size = min(abs(x), LARGEST[element])
    best = min(codes, key=lambda code: (abs(number(code, element) - size), code % 2))
    return best + (2**bits if math.copysign(1.0, x) < 0 else 0)


def shared_exponent(block: list[float], element: str) -> int:
    """Step 1 of the MX specification's conversion: floor(log2 max|v|) - emax."""
    largest = max(abs(v) for v in block)
    return 0 if largest == 0 else math.floor(math.log2(largest)) - HIGHEST_EXPONENT[element]


def mx_block(block: list[float], element: str) -> list[float]:
    """A block there and back."""
    step = 2.0 ** shared_exponent(block, element)
    return [number(nearest(v / step, element), element) * step for v in block]


def nvfp4_block(block: list[float], tensor_scale: float) -> list[float]:
    """A block of NVFP4 there and back: the scale is an E4M3 number of at least the smallest size."""
    largest = max(abs(v) for v in block)
    code = max(1, nearest((largest or LARGEST["e2m1"]) / LARGEST["e2m1"] / tensor_scale, "e4m3"))
    step = number(code, "e4m3") * tensor_scale
    return [number(nearest(v / step, "e2m1"), "e2m1") * step for v in block]


def error(block: list[float], element: str, step: float) -> float:
    """Squared error of a block at a scale."""
    return sum((number(nearest(v / step, element), element) * step - v) ** 2 for v in block)

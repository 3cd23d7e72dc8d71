"""Rounded inputs, one token and one group at a time, in plain float64.

Integers, symmetric: s = c·max|x| / (2^(b-1) - 1), codes from -2^(b-1) to 2^(b-1) - 1. With zero points:
s = c·(max - min)/(2^b - 1), z = round(-c·min/s), zero inside [min, max]. FP8: s = c·max|x| / 448. The block formats
as in `minifloat`.
"""

from tests.reference.minifloat import LARGEST, mx_block, nearest, number, nvfp4_block

ELEMENT = {"fp8": "e4m3", "mxfp8": "e4m3", "mxfp6": "e2m3", "mxfp4": "e2m1", "nvfp4": "e2m1"}


def integers(group: list[float], bits: int, symmetric: bool, clip: float, scale: float | None = None) -> list[float]:
    """A group there and back."""
    if symmetric:
        half = 2 ** (bits - 1)
        s = scale or clip * max(abs(v) for v in group) / (half - 1) or 1.0
        return [min(max(round(v / s), -half), half - 1) * s for v in group]
    top, low, high = 2**bits - 1, min(0.0, *group), max(0.0, *group)
    s = clip * (high - low) / top or 1.0
    z = min(max(round(-clip * low / s), 0), top)
    return [(min(max(round(v / s) + z, 0), top) - z) * s for v in group]


def fp8(group: list[float], clip: float, scale: float | None = None) -> list[float]:
    """E4M3 with a real scale."""
    s = scale or clip * max(abs(v) for v in group) / LARGEST["e4m3"] or 1.0
    return [number(nearest(v / s, "e4m3"), "e4m3") * s for v in group]


def token(
    x: list[float],
    form: str,
    size: int,
    *,
    bits: int = 8,
    symmetric: bool = True,
    clip: float = 1.0,
    scale: float | None = None,
    kept: tuple[int, ...] = (),
) -> list[float]:
    """One token's features there and back; those `kept` stay and do not count."""
    rest = [0.0 if j in kept else v for j, v in enumerate(x)]
    found: list[float] = []
    for start in range(0, len(x), size):
        group = rest[start : start + size]
        if form == "int":
            found += integers(group, bits, symmetric, clip, scale)
        elif form == "fp8":
            found += fp8(group, clip, scale)
        elif form == "nvfp4":
            assert scale is not None
            found += nvfp4_block(group, scale)
        else:
            found += mx_block(group, ELEMENT[form])
    return [x[j] if j in kept else v for j, v in enumerate(found)]

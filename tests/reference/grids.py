"""Uniform grids from METHODS' formulas, one group at a time, in plain float64.

Asymmetric: s = (max - min)/(2^b - 1), z = round(-min/s), with zero inside [min, max]. Symmetric: the same over
[-max|w|, max|w|] with z = 2^(b-1). A scale is rounded to the dtype that stores it before anything is divided by it.
"""

from dataclasses import dataclass

import torch

Matrix = list[list[float]]


@dataclass(frozen=True)
class Grids:
    """Scale and zero point for each row and group."""

    scale: Matrix
    zero: Matrix
    bits: int
    group_size: int

    def code(self, value: float, row: int, column: int) -> int:
        """The nearest code, ties to even."""
        scale, zero = self.at(row, column)
        return min(max(round(value / scale) + int(zero), 0), 2**self.bits - 1)

    def near_tie(self, value: float, row: int, column: int) -> bool:
        """Whether a value lies so near the middle of two grid points that float32 may round it the other way."""
        return abs(abs(value / self.at(row, column)[0]) % 1 - 0.5) < 1e-5

    def value(self, code: int, row: int, column: int) -> float:
        """What a code stands for."""
        scale, zero = self.at(row, column)
        return (code - zero) * scale

    def at(self, row: int, column: int) -> tuple[float, float]:
        """Scale and zero point of one entry; a single row of scales serves every row."""
        i, j = row if len(self.scale) > 1 else 0, column // self.group_size
        return self.scale[i][j], self.zero[i][j]


def stored(value: float, dtype: torch.dtype) -> float:
    """A scale as the dtype holds it; an all-zero group gets 1."""
    return float(torch.tensor(value, dtype=torch.float64).to(dtype)) if value else 1.0


def group_grid(group: list[float], bits: int, symmetric: bool, dtype: torch.dtype) -> tuple[float, float]:
    """Scale and zero point that span a group's extremes."""
    top = 2**bits - 1
    if symmetric:
        return stored(2 * max(abs(v) for v in group) / top, dtype), float(2 ** (bits - 1))
    low, high = min(0.0, *group), max(0.0, *group)
    scale = stored((high - low) / top, dtype)
    return scale, float(min(max(round(-low / scale), 0), top))


def fit(w: Matrix, bits: int, group_size: int | str, symmetric: bool, dtype: torch.dtype) -> Grids:
    """Grids of a whole matrix; group_size may be "channel" or "tensor"."""
    width = len(w[0])
    if group_size == "tensor":
        scale, zero = group_grid([v for row in w for v in row], bits, symmetric, dtype)
        return Grids([[scale]], [[zero]], bits, width)
    size = width if group_size == "channel" else int(group_size)
    pairs = [[group_grid(row[j : j + size], bits, symmetric, dtype) for j in range(0, width, size)] for row in w]
    return Grids([[p[0] for p in row] for row in pairs], [[p[1] for p in row] for row in pairs], bits, size)


def codes(w: Matrix, grids: Grids) -> list[list[int]]:
    """Every weight's nearest code."""
    return [[grids.code(value, i, j) for j, value in enumerate(row)] for i, row in enumerate(w)]


def differences(w: Matrix, grids: Grids, found: list[list[int]]) -> list[tuple[int, int]]:
    """Entries whose code is not the reference's, near ties aside (a symmetric group's extreme lies on one)."""
    return [
        (i, j)
        for i, row in enumerate(codes(w, grids))
        for j, code in enumerate(row)
        if abs(found[i][j] - code) > grids.near_tie(w[i][j], i, j)
    ]


def values(codes_: list[list[int]], grids: Grids) -> Matrix:
    """What the codes stand for."""
    return [[grids.value(code, i, j) for j, code in enumerate(row)] for i, row in enumerate(codes_)]

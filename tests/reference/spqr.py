"""SpQR's grids and outliers, group by group in float64, from the paper's definitions (with integer zero points)."""

from dataclasses import dataclass

import torch

from tests.reference.grids import Matrix


@dataclass(frozen=True)
class Group:
    """One group of one row."""

    values: list[float]
    used: list[bool]
    importance: list[float]
    top: int

    def ends(self) -> tuple[float, float]:
        """Least and largest used value, zero included."""
        inside = [v for v, u in zip(self.values, self.used, strict=True) if u]
        return min(0.0, *inside, 0.0), max(0.0, *inside, 0.0)

    def spanning(self) -> tuple[float, int]:
        """Scale and zero point that span the ends."""
        low, high = self.ends()
        scale = (high - low) / self.top or 1.0
        return scale, min(max(round(-low / scale), 0), self.top)

    def error(self, scale: float, zero: int) -> float:
        """Σ importance·(v - v̂)² of what is used."""
        return sum(
            i * (v - rounded(v, scale, zero, self.top)) ** 2
            for v, u, i in zip(self.values, self.used, self.importance, strict=True)
            if u
        )

    def without(self, entry: int) -> "Group":
        """The group when one entry is stored apart."""
        used = [u and k != entry for k, u in enumerate(self.used)]
        return Group(self.values, used, self.importance, self.top)


def rounded(value: float, scale: float, zero: int, top: int) -> float:
    """The nearest value on the grid."""
    code = min(max(round(value / scale) + zero, 0), top)
    return (code - zero) * scale


def groups(w: Matrix, used: list[list[bool]], importance: list[float], bits: int, size: int) -> list[list[Group]]:
    """All groups of a matrix, by row."""
    cuts = range(0, len(importance), size)
    return [
        [Group(row[j : j + size], u[j : j + size], importance[j : j + size], 2**bits - 1) for j in cuts]
        for row, u in zip(w, used, strict=True)
    ]


def gains(table: list[list[Group]]) -> Matrix:
    """What each entry's group saves when the entry is stored apart; zero for entries that are not used."""
    found = []
    for row in table:
        line: list[float] = []
        for group in row:
            before = group.error(*group.spanning())
            for k, used in enumerate(group.used):
                less = group.without(k)
                line.append(before - less.error(*less.spanning()) if used else 0.0)
        found.append(line)
    return found


def second_level(scales: list[float], bits: int, dtype: torch.dtype) -> tuple[float, float]:
    """Base and step, as stored, that span the scales of one block; zeros do not count."""
    above = [s for s in scales if s > 0]
    base = float(torch.tensor(min(above) if above else 1.0, dtype=torch.float64).to(dtype))
    step = max(0.0, (max(above, default=0.0) - base) / (2**bits - 1))
    return base, float(torch.tensor(step, dtype=torch.float64).to(dtype))


def best_code(group: Group, base: float, step: float, bits: int) -> tuple[int, int]:
    """Scale code and zero point with the least error; the zero point centres the grid on the group's span."""
    low, high = group.ends()
    tried = []
    for code in range(2**bits):
        scale = base + code * step
        zero = min(max(round((group.top - (low + high) / scale) / 2), 0), group.top)
        tried.append((group.error(scale, zero), code, zero))
    _, code, zero = min(tried, key=lambda t: t[0])
    return code, zero

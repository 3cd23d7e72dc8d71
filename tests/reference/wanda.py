"""Wanda, entry by entry: in each row (or run of m entries) the smallest |w|·‖x_j‖₂ go."""

import math

from tests.reference.grids import Matrix


def norms(x: Matrix) -> list[float]:
    """‖x_j‖₂ of each feature over the tokens."""
    return [math.sqrt(sum(row[j] ** 2 for row in x)) for j in range(len(x[0]))]


def survivors(w: Matrix, x: Matrix, num_dropped: int, every: int | None = None) -> list[list[bool]]:
    """True for what is kept: all but `num_dropped` of each run of `every` entries; ties drop the earlier one."""
    norm = norms(x)
    run = every or len(w[0])
    kept = [[True] * len(row) for row in w]
    for i, row in enumerate(w):
        for start in range(0, len(row), run):
            ranked = sorted((abs(row[j]) * norm[j], j) for j in range(start, start + run))
            for _, j in ranked[:num_dropped]:
                kept[i][j] = False
    return kept

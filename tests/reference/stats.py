"""Input statistics, summed token by token in float64."""

from tests.reference.grids import Matrix


def gram(x: Matrix) -> Matrix:
    """Σ x·xᵀ."""
    n = len(x[0])
    return [[sum(row[i] * row[j] for row in x) for j in range(n)] for i in range(n)]


def square_sum(x: Matrix) -> list[float]:
    """Σ x²."""
    return [sum(v * v for v in column) for column in zip(*x, strict=True)]


def abs_max(x: Matrix) -> list[float]:
    """max |x|."""
    return [max(abs(v) for v in column) for column in zip(*x, strict=True)]


def moments(x: Matrix) -> tuple[list[float], list[float], list[float]]:
    """Mean, mean |x| and population variance of each feature."""
    columns = list(zip(*x, strict=True))
    mean = [sum(c) / len(c) for c in columns]
    mean_abs = [sum(abs(v) for v in c) / len(c) for c in columns]
    variance = [sum((v - m) ** 2 for v in c) / len(c) for c, m in zip(columns, mean, strict=True)]
    return mean, mean_abs, variance

"""Weighted k-means in one dimension, exactly: dynamic programming over every way to cut the sorted values."""


def cost(values: list[float], weights: list[float]) -> float:
    """Σ w·(v - mean)² of one cell."""
    total = sum(weights)
    if total == 0:
        return 0.0
    mean = sum(w * v for w, v in zip(weights, values, strict=True)) / total
    return sum(w * (v - mean) ** 2 for w, v in zip(weights, values, strict=True))


def least_error(values: list[float], weights: list[float], num_centers: int) -> float:
    """The least Σ weights·(value - nearest center)² that so many centers can reach."""
    pairs = sorted(zip(values, weights, strict=True))
    v, w = [p[0] for p in pairs], [p[1] for p in pairs]
    n = len(v)
    cells = {(i, j): cost(v[i:j], w[i:j]) for i in range(n + 1) for j in range(i, n + 1)}
    best = [cells[0, j] for j in range(n + 1)]
    for _ in range(num_centers - 1):
        best = [min(best[i] + cells[i, j] for i in range(j + 1)) for j in range(n + 1)]
    return best[n]


def nearest(value: float, centers: list[float]) -> int:
    """The number of the nearest center, the first of equally near ones."""
    return min(range(len(centers)), key=lambda k: abs(value - centers[k]))


def error(values: list[float], weights: list[float], centers: list[float]) -> float:
    """Σ weights·(value - nearest center)²."""
    pairs = zip(values, weights, strict=True)
    return sum(w * (v - centers[nearest(v, centers)]) ** 2 for v, w in pairs)

"""Signs, trits and sizes in float64, one entry at a time, from the papers' formulas; optima by trying everything."""

from collections.abc import Callable

import torch
from torch import Tensor

from tests.reference.gptq import prepared
from tests.reference.grids import Matrix, stored


def ternary_scale(group: list[float], importance: list[float]) -> float:
    """The scale of least Σ h·(w - scale·t)²: for every set of the largest |w| its own best scale, the best of all."""
    best, least = 0.0, float("inf")
    for threshold in sorted({abs(v) for v in group}):
        chosen = [i for i, v in enumerate(group) if abs(v) >= threshold]
        scale = sum(importance[i] * abs(group[i]) for i in chosen) / sum(importance[i] for i in chosen)
        error = sum(
            h * (abs(v) - (scale if i in chosen else 0)) ** 2
            for i, (v, h) in enumerate(zip(group, importance, strict=True))
        )
        if error < least - 1e-12:
            best, least = scale, error
    return best


def trit(value: float, scale: float) -> int:
    """RoundClip(value / scale, -1, 1)."""
    return max(-1, min(1, round(value / scale)))


def mean(values: list[float], weights: list[float]) -> float:
    """Weighted; 0 for nothing."""
    total = sum(weights)
    return sum(v * h for v, h in zip(values, weights, strict=True)) / total if total else 0.0


def two_sizes(sizes: list[float], weights: list[float]) -> tuple[float, float, float]:
    """Means below and above the split with the least weighted squared error, and that error."""
    found = []
    pairs = sorted(zip(sizes, weights, strict=True))
    for cut in range(1, len(pairs) + 1):
        parts = pairs[:cut], pairs[cut:] or pairs[:cut]
        low, high = (mean([v for v, _ in part], [h for _, h in part]) for part in parts)
        error = sum(h * (v - low) ** 2 for v, h in pairs[:cut]) + sum(h * (v - high) ** 2 for v, h in pairs[cut:])
        found.append((error, low, high))
    error, low, high = min(found)
    return low, high, error


def residual_sizes(sizes: list[float], weights: list[float]) -> tuple[float, float]:
    """Binarize, then binarize what is lost: the mean |w|, then the mean distance of |w| from it."""
    first = mean(sizes, weights)
    second = mean([abs(v - first) for v in sizes], weights)
    return first - second, first + second


def least_squares_scales(w: Tensor, H: Tensor, design: list[Tensor], before: Tensor | None = None) -> Tensor:
    """For one row, the x with the least (w - Σ x_k·design_k)·H·(…)ᵀ, through a root of H.

    Given `before`, moving x_k away from it costs 1e-4 of what the k-th term alone weighs.
    """
    values, vectors = torch.linalg.eigh(H.double())
    root = vectors * values.clamp(min=0).sqrt()
    A = (torch.stack([column.double() for column in design]) @ root).T
    b = w.double() @ root
    if before is not None:
        drag = torch.diag(A.square().sum(0).mul(1e-4).sqrt())
        A, b = torch.cat([A, drag]), torch.cat([b, drag @ before.double()])
    return torch.linalg.lstsq(A, b.unsqueeze(1)).solution.squeeze(1)


def blockwise(w: Tensor, H: Tensor, code: Callable[[int, Tensor], Tensor], block: int) -> Tensor:
    """Round block after block; those not yet rounded go where the output error of all before them is least."""
    damped, _, dead = prepared(H.tolist(), 0.01, act_order=False)
    full = torch.tensor(damped, dtype=torch.float64)
    target = w.double().masked_fill(torch.tensor(dead), 0.0)
    q = torch.zeros_like(target)
    for start in range(0, w.shape[1], block):
        now = target[:, start:]
        if start:
            lost = target[:, :start] - q[:, :start]
            now = now + lost @ full[:start, start:] @ torch.linalg.inv(full[start:, start:])
        stop = min(start + block, w.shape[1])
        q[:, start:stop] = code(start, now[:, : stop - start])
    return q


def billm_block(
    values: Tensor, pivots: list[float], max_salient: float, dtype: torch.dtype
) -> tuple[Tensor, list[int], float]:
    """The paper's coding of one block: salient columns, break-point, two sizes a row for each part.

    Args:
        values: [out, n], float64.
        pivots: U_jj of each column.
        max_salient: largest fraction of salient columns.
        dtype: of stored scales.

    Returns:
        The coded block, the salient columns, the break-point.
    """
    rows, width = values.shape
    size = values.abs().tolist()
    score = [sum((size[i][j] / pivots[j]) ** 2 for i in range(rows)) for j in range(width)]
    ranked = sorted(range(width), key=lambda j: -score[j])
    ones = [1.0] * width

    def lost(columns: list[int]) -> float:
        error = 0.0
        for row in size:
            part = [row[j] for j in columns]
            first = mean(part, ones[: len(part)])
            second = mean([abs(v - first) for v in part], ones[: len(part)])
            error += sum((abs(v - first) - second) ** 2 for v in part)
        return error

    counts = range(int(max_salient * width) + 1)
    best = min(counts, key=lambda k: (lost(ranked[:k]) + lost(ranked[k:]), k))
    salient, rest = sorted(ranked[:best]), sorted(ranked[best:])
    ordered = sorted(size[i][j] for i in range(rows) for j in rest)
    tried = [ordered[int(p * (len(ordered) - 1))] for p in torch.linspace(0.1, 0.9, 81).tolist()]
    split = min(tried, key=lambda s: sum(split_error([row[j] for j in rest], s) for row in size))
    coded = torch.zeros_like(values)
    for i, row in enumerate(size):
        for columns, sizes in (
            (rest, split_sizes([row[j] for j in rest], split)),
            (salient, residual_sizes([row[j] for j in salient], ones[: len(salient)])),
        ):
            if not columns:
                continue
            middle = stored((sizes[0] + sizes[1]) / 2, dtype)
            distance = float(torch.tensor((sizes[1] - sizes[0]) / 2).to(dtype))
            border = split if columns is rest else (sizes[0] + sizes[1]) / 2
            for j in columns:
                coded[i, j] = (middle + distance if row[j] > border else middle - distance) * (
                    1 if values[i, j] >= 0 else -1
                )
    return coded, salient, split


def split_sizes(sizes: list[float], split: float) -> tuple[float, float]:
    """Means of what does not exceed the split, and of what does; equal where one is empty."""
    low, high = [v for v in sizes if v <= split], [v for v in sizes if v > split]
    means = [mean(part, [1.0] * len(part)) for part in (low or high, high or low)]
    return means[0], means[1]


def split_error(sizes: list[float], split: float) -> float:
    """Squared error of the two means."""
    low, high = split_sizes(sizes, split)
    return sum((v - (high if v > split else low)) ** 2 for v in sizes)


def signs_and_integers(value: float, scale: float, step: float, bits: int, salient: bool) -> float:
    """PB-LLM's value of an entry: its sign's, and where it is salient the nearest integer step from that."""
    base = scale if value >= 0 else -scale
    if not salient:
        return base
    top = 2 ** (bits - 1) - 1
    return base + max(-top, min(top, round((value - base) / step))) * step


def as_matrix(rows: Matrix) -> Tensor:
    """Float64."""
    return torch.tensor(rows, dtype=torch.float64)

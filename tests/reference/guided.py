"""Guided statistics, as slow loops in float64: tokens weighted by squared gradients, averaged over output groups."""

import torch
from torch import Tensor


def token_weights(gradient: Tensor, groups: int) -> list[list[float]]:
    """By token, then by group: the mean of (∂L/∂z_j)² over the group's outputs j."""
    tokens, out = gradient.shape
    found = []
    for t in range(tokens):
        sums, counts = [0.0] * groups, [0] * groups
        for j in range(out):
            group = next(g for g in range(groups) if j < (g + 1) * out // groups)
            sums[group] += float(gradient[t, j]) ** 2
            counts[group] += 1
        found.append([s / c for s, c in zip(sums, counts, strict=True)])
    return found


def weighted_hessian(x: Tensor, weights: list[float]) -> Tensor:
    """(2 / Σc)·Σ c·x·xᵀ: that of unweighted inputs if all weigh the same."""
    total = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    for row, weight in zip(x.double(), weights, strict=True):
        total += weight * torch.outer(row, row)
    return 2.0 / sum(weights) * total


def weighted_cross(x: Tensor, original: Tensor, weights: list[float]) -> Tensor:
    """Σ c·(x' - x)·xᵀ, the mean weight brought to 1."""
    total = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    for row, before, weight in zip(x.double(), original.double(), weights, strict=True):
        total += weight * torch.outer(before - row, row)
    return len(weights) / sum(weights) * total

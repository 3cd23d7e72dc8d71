"""Agglomerative clustering: the two groups that are nearest become one, until few enough are left."""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

Linkage = Literal["average", "complete", "single"]


def agglomerate(
    distances: Float[Tensor, "items items"], num_groups: int, linkage: Linkage = "average"
) -> Int[Tensor, " items"]:
    """Each item's group; groups are numbered in the order of their first members.

    Distances between groups follow from those between items by the recurrences of Lance and Williams. Of pairs that
    are equally near, the first is joined, so the result depends on the numbers alone.

    Args:
        distances: symmetric, finite.
        num_groups: how many to end with, at least 1.
        linkage: how far two groups are from each other: as their items on average, or the farthest, or the nearest.
    """
    found = distances.to(torch.float64, copy=True).fill_diagonal_(torch.inf)
    sizes = torch.ones(len(found), dtype=torch.float64)
    labels = torch.arange(len(found))
    for _ in range(len(found) - num_groups):
        i, j = divmod(int((found.flatten() == found.min()).nonzero()[0]), len(found))  # i < j: the matrix is symmetric
        joined = _joined(found[i], found[j], float(sizes[i]), float(sizes[j]), linkage)
        found[i], found[:, i] = joined, joined
        found[j], found[:, j], found[i, i] = torch.inf, torch.inf, torch.inf
        sizes[i] += sizes[j]
        labels[labels == j] = i
    groups: Tensor = torch.unique(labels, return_inverse=True)[1]
    return groups


def _joined(first: Tensor, second: Tensor, m: float, n: float, linkage: Linkage) -> Tensor:
    """Distances of everything to what two groups of m and n items become."""
    if linkage == "complete":
        return torch.maximum(first, second)
    if linkage == "single":
        return torch.minimum(first, second)
    return (first * m + second * n) / (m + n)

"""Levels that many groups share, placed where their numbers lie: weighted k-means of a fine histogram.

A model's keys and values are too many to be kept until the levels are chosen, so bins of [0, 1] count them. A bin knows
the mean of what fell into it, so only a boundary between two levels can be off, by less than a bin.
"""

from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor

from decoct.ops.kmeans import weighted_kmeans

_BINS = 4096


class LevelCounts:
    """Weights and moments of numbers in [0, 1] by bin.

    Attributes:
        mass: [bins] float64, the weights.
        moment: [bins] float64, weight times number.
    """

    def __init__(self) -> None:
        self.mass = torch.zeros(_BINS, dtype=torch.float64)
        self.moment = torch.zeros(_BINS, dtype=torch.float64)

    def add(self, x: Float[Tensor, "*any"], weights: Float[Tensor, "*any"]) -> Self:
        """Count numbers, those outside [0, 1] as its ends; weights are not negative."""
        inside, mass = x.double().flatten().clamp(0, 1), weights.double().flatten()
        bins = (inside * _BINS).long().clamp_(max=_BINS - 1)
        self.mass += torch.bincount(bins, mass, _BINS)
        self.moment += torch.bincount(bins, mass * inside, _BINS)
        return self

    def levels(self, count: int) -> Float[Tensor, " levels"]:
        """Levels, ascending, with the least weighted squared distance to the nearest, nearly; float32.

        Raises:
            ValueError: weights that are not finite.
        """
        middles = (torch.arange(_BINS, dtype=torch.float64) + 0.5) / _BINS
        means = torch.where(self.mass > 0, self.moment / self.mass, middles)
        return weighted_kmeans(means.unsqueeze(0), self.mass.unsqueeze(0), count)[0]

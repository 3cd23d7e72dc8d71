"""Magnitude pruning (arXiv 1506.02626): drop the weights that are smallest in absolute value."""

from dataclasses import dataclass
from typing import Any

from decoct.methods.pruning import Pruning
from decoct.weights import Weight


@dataclass(frozen=True, slots=True, kw_only=True)
class Magnitude(Pruning):
    """Prune without data: the baseline of every pruning paper. See Pruning for the settings."""

    def compress(self, weight: Weight, stat: Any = None) -> Weight:  # noqa: ARG002 - it needs no statistic
        """Prune; what was pruned before stays pruned, what was quantized stays quantized."""
        return self.drop(weight, lambda w: w.float().abs(), "magnitude")

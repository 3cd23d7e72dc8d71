"""Optimal brain surgeon (arXiv 2208.11580, after Hassibi and Stork, 1993): one weight at a time, all others move."""

from dataclasses import dataclass
from typing import ClassVar

from decoct.methods.pruning import Pruning
from decoct.ops.surgeon import surgeon
from decoct.stats import Gram
from decoct.weights import Weight

_WIDEST = 1024  # input features: the time grows with their third power, for every row


@dataclass(frozen=True, slots=True, kw_only=True)
class OBS(Pruning):
    """Greedy and exact at each step: the reference that faster methods approximate. For small matrices.

    See Pruning for the settings that are not named here.

    Attributes:
        damping: fraction of the Hessian's mean diagonal added to it; raised if the factorization fails.
    """

    scope: str = "layer"
    damping: float = 0.01

    stat: ClassVar[type[Gram]] = Gram

    def __post_init__(self) -> None:
        Pruning.__post_init__(self)
        if not 0 < self.damping <= 1:
            raise ValueError(f"damping must be above 0 and at most 1, not {self.damping}")

    def check(self, shape: tuple[int, int]) -> None:
        """The pattern must fit, and rows must be short."""
        Pruning.check(self, shape)
        if shape[1] > _WIDEST:
            raise ValueError(
                f"obs takes too long for {shape[1]} input features, {_WIDEST} at most; use sparsegpt or alps"
            )

    def workspace(self, shape: tuple[int, int]) -> int:
        """Weights, costs and orders in 64 bits; the Hessian and its inverse, and those of some rows."""
        return 64 * shape[0] * shape[1] + 64 * shape[1] ** 2 + (1 << 25)

    def operations(self, shape: tuple[int, int]) -> float:
        """An update of each row's inverse Hessian for every weight that goes, and solving for what is left."""
        out, cols = shape
        part = (
            1.0
            if self.m is None and self.scope == "layer"
            else self.pattern(shape).num_dropped / self.pattern(shape).run
        )
        return out * cols**3 * (20.0 * part + 1.0)

    def compress(self, weight: Weight, stat: Gram) -> Weight:
        """Prune; what was pruned stays pruned."""
        return self.refit(
            weight,
            lambda w, kept: surgeon(
                w, stat.matrix(), self.pattern((w.shape[0], w.shape[1])), kept=kept, damping=self.damping
            ),
            "obs",
        )

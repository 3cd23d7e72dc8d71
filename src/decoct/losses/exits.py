"""A loss at several exits (LayerSkip, arXiv 2404.16710): every depth learns to predict, deeper ones more."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

from decoct.losses.base import Batch, PredictionLoss
from decoct.losses.chunks import AT_ONCE
from decoct.losses.distribution import Projected, Targets
from decoct.losses.forward_kl import ForwardKL


@dataclass(frozen=True, slots=True, kw_only=True)
class Exits:
    """A weighted mean of one loss at several depths of the student, all through the same head.

    Attributes:
        each: the loss on the predictions of a depth.
        num_exits: depths, spread evenly, the whole model among them.
        scale: what earlier exits weigh, between 0 and 1: depth l of L weighs scale · (1 + … + l), the last one
            L - 1 more.
    """

    each: PredictionLoss = field(default_factory=ForwardKL)
    num_exits: int = 4
    scale: float = 0.2

    def __post_init__(self) -> None:
        if self.num_exits < 1:
            raise ValueError(f"num_exits must be at least 1, not {self.num_exits}")
        if not 0 < self.scale <= 1:
            raise ValueError(f"scale must be positive and at most 1, not {self.scale:g}")

    def __call__(
        self, students: Mapping[int, Projected], teacher: Targets | None, batch: Batch, at_once: int = AT_ONCE
    ) -> Float[Tensor, ""]:
        """The weighted mean, differentiable by every depth's states and the head.

        Args:
            students: predictions by the number of the block behind which they are made, from 0; the largest is the
                whole model.
            teacher: see `PredictionLoss`.
            batch: see there.
            at_once: see there.

        Raises:
            ValueError: as the loss, or there are no exits.
        """
        if not students:
            raise ValueError("no exits are given")
        weights = self.weights(list(students))
        found = [weight * self.each(students[block], teacher, batch, at_once) for block, weight in weights.items()]
        return sum(found[1:], start=found[0])

    def blocks(self, num_blocks: int) -> list[int]:
        """The blocks behind which a model of so many is to predict, by number from 0."""
        count = min(self.num_exits, num_blocks)
        return [(i + 1) * num_blocks // count - 1 for i in range(count)]

    def weights(self, blocks: list[int]) -> dict[int, float]:
        """What each exit weighs, by its block; the sum is 1."""
        last = max(blocks)
        raw = {block: self.scale * block * (block + 1) / 2 for block in blocks if block != last}
        raw[last] = last + self.scale * (last - 1) * last / 2
        if last == 0:
            return {0: 1.0}
        total = sum(raw.values())
        return {block: value / total for block, value in raw.items()}

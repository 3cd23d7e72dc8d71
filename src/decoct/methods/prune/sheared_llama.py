"""Sheared LLaMA (arXiv 2310.06694): which neurons and heads go is learned, by masks pushed towards a given shape."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from decoct.methods.width import Channels, WidthMethod


@dataclass(frozen=True, slots=True, kw_only=True)
class ShearedLLaMA(WidthMethod):
    """Every unit gets a hard concrete mask; the text's loss and the distance from the shape move it.

    A Lagrangian with two multipliers for each edge of each block, which grow as long as the expected number of units
    is off, holds the masks to as many as `keep` and `keep_heads` leave; the number wanted falls from all of them
    linearly during `warmup`. In the end the units whose masks are likeliest open stay. See `WidthMethod` for the other
    settings. The paper trains the weights along and folds the masks in; here they stay until a stage `distill`, and
    the matrix behind is refitted. The whole model must fit in memory, unpacked.

    Attributes:
        num_steps: of learning.
        batch_size: sequences in each.
        learning_rate: of the masks' logits.
        warmup: fraction of the steps in which the shape is approached.
        seed: of the draws and of the order of sequences.
    """

    num_steps: int = 300
    batch_size: int = 4
    learning_rate: float = 0.05
    warmup: float = 0.5
    seed: int = 0

    by_gradient: ClassVar[bool] = True

    def __post_init__(self) -> None:
        WidthMethod.__post_init__(self)
        if min(self.num_steps, self.batch_size) < 1:
            raise ValueError("num_steps and batch_size must be at least 1")
        if not self.learning_rate > 0 or not 0 <= self.warmup <= 1:
            raise ValueError("learning_rate must be positive, and warmup a fraction of the steps")
        if self.uneven:
            raise ValueError("masks are held to the same number in every block; set uneven: false")

    @override
    def scores(self, channels: Channels) -> Float[Tensor, " units"]:
        """The logits of the masks."""
        assert channels.information is not None
        return channels.information

    def wanted(self, step: int, num_units: int, num_kept: int) -> float:
        """The fraction of an edge's units that is aimed at in a step, counted from 0."""
        way = min(1.0, (step + 1) / max(1.0, self.warmup * self.num_steps))
        return 1.0 - way * (1.0 - num_kept / num_units)

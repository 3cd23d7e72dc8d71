"""SpinQuant (arXiv 2405.16406): learn the rotations with which the model loses least when its inputs are rounded."""

import math
from dataclasses import dataclass

from decoct.methods.base import Rotation


@dataclass(frozen=True, slots=True, kw_only=True)
class SpinQuant(Rotation):
    """Start from QuaRot's rotations and turn them, on the whole model, towards a smaller next-token loss.

    While it learns, what each matrix of a block reads is rounded, token by token; matrices are not, since a quantizer
    that compensates (gptq) comes after. The rotations of the residual stream and of the values are learned, those that
    the model does while it runs are not. Of the model, one block at a time is in memory.

    Attributes:
        num_steps: gradient steps.
        batch_size: sequences in each.
        learning_rate: of Cayley SGD; decays to zero along a cosine.
        bits: of the rounded inputs.
        clip_ratio: fraction of a token's largest entry that the largest code stands for.
    """

    num_steps: int = 100
    batch_size: int = 8
    learning_rate: float = 0.02
    bits: int = 4
    clip_ratio: float = 1.0

    def __post_init__(self) -> None:
        if not (self.residual or self.values):
            raise ValueError("residual and values are all off: nothing would be learned; use quarot")
        if self.num_steps < 1 or self.batch_size < 1:
            raise ValueError("num_steps and batch_size must be at least 1")
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits must be 2 to 8, not {self.bits}")
        if not 0 < self.clip_ratio <= 1 or self.learning_rate <= 0:
            raise ValueError("clip_ratio must lie between 0 and 1, learning_rate above 0")

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        return self.learning_rate * 0.5 * (1.0 + math.cos(math.pi * step / self.num_steps))

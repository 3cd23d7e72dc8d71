"""SliceGPT (arXiv 2401.15024): turn the residual stream to its principal components, and cut off the least of them."""

from dataclasses import dataclass

from decoct.methods.base import ModelMethod


@dataclass(frozen=True, slots=True, kw_only=True)
class SliceGPT(ModelMethod):
    """Makes hidden states narrower: every matrix loses the rows or columns that the dropped components stood for.

    A stage of its own in a recipe, before those that compress matrices. The paper turns each block's stream by a
    rotation of its own and stores what leads from one to the next; here one rotation serves the whole model, so that
    the result is a plain checkpoint. A tied lm_head becomes a matrix of its own, since the final norm's gain is folded
    into it.

    Attributes:
        keep: fraction of the hidden size that stays.
        multiple_of: the hidden size left is divisible by it, and by what the architecture asks for.
    """

    keep: float = 0.8
    multiple_of: int = 8

    def __post_init__(self) -> None:
        if not 0 < self.keep < 1:
            raise ValueError(f"keep must lie between 0 and 1, not {self.keep}")
        if self.multiple_of < 1:
            raise ValueError(f"multiple_of must be at least 1, not {self.multiple_of}")

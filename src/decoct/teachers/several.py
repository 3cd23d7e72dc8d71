"""Several teachers at once: the mean of their probabilities, or for each token the one that is surest."""

from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor

from decoct.losses import Mixed, MostConfident, Targets
from decoct.teachers.base import Teach


@dataclass(frozen=True, slots=True)
class Several:
    """A teacher made of several that share the student's tokenizer.

    Attributes:
        members: the teachers.
        weights: of each in the mean; None: for each token the one whose likeliest token is likeliest.
    """

    members: tuple[Teach, ...]
    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not self.members:
            raise ValueError("no teacher is given")
        if self.weights is not None and (len(self.weights) != len(self.members) or min(self.weights) <= 0):
            raise ValueError(f"{len(self.members)} teachers need as many positive weights, not {list(self.weights)}")

    def __call__(self, tokens: Int[Tensor, "batch length"]) -> Targets:
        """What they predict together.

        Raises:
            ValueError: their vocabularies differ.
        """
        found = tuple(member(tokens) for member in self.members)
        return MostConfident(found) if self.weights is None else Mixed(found, self.weights)

"""What a decode loop runs: a network with seats, each of which holds one sequence."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Feed:
    """Tokens that come next in one sequence.

    Attributes:
        seat: which sequence.
        tokens: one or more; all at once where they are a prompt.
    """

    seat: int
    tokens: Sequence[int]


class Network(Protocol):
    """A model that goes on with several sequences at once, whatever lies before each of them.

    Attributes:
        about: one line: what computes, for people.
        context: the most tokens that a sequence may have.
        num_seats: sequences that it holds at once.
    """

    about: str
    context: int
    num_seats: int

    @property
    def nbytes(self) -> int:
        """Bytes of the weights that a token passes through."""

    def advance(self, feeds: Sequence[Feed]) -> Float[Tensor, "feeds vocab"]:
        """Take tokens in; gives the float32 logits after the last token of each feed. Each seat at most once."""

    def length(self, seat: int) -> int:
        """Tokens that a sequence has so far."""

    def release(self, seat: int) -> None:
        """Forget a sequence; its seat is free for another."""

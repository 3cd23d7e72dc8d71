"""Methods that make a model shallower: they choose blocks, or the attention or MLP of some, to take out."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Literal, Protocol

from decoct.methods.base import ModelMethod

Part = Literal["block", "attn", "mlp"]


@dataclass(frozen=True, slots=True, order=True)
class Cut:
    """Something that is taken out; the residual stream goes on past it.

    Attributes:
        block: its number in the model as it was.
        part: the whole block, its attention or its MLP.
    """

    block: int
    part: Part = "block"

    def __str__(self) -> str:
        """For people."""
        return f"block {self.block}" if self.part == "block" else f"the {self.part} of block {self.block}"


Cuts = frozenset[Cut]


class Probe(Protocol):
    """What a method may find out about the model, on the calibration text."""

    @property
    def num_blocks(self) -> int:
        """The model's."""

    def share(self, cut: Cut) -> float:
        """What a cut takes out, in blocks: parameters as a fraction of the block's; 1 for a whole block."""

    def influences(self) -> list[float]:
        """1 - E[cos(x, y)] of each block, x what enters it and y what leaves it, over all tokens."""

    def angles(self, span: int) -> list[float]:
        """E[arccos(cos(x, y))] / pi of every run of `span` blocks, x what enters it and y what leaves it."""

    @property
    def num_sequences(self) -> int:
        """Calibration sequences to choose by; no more than there are."""

    def losses(self, candidates: Sequence[Cuts], num_sequences: int | None = None) -> list[float]:
        """Mean KL(whole model ‖ model without these), nats a token, of each candidate; all in one pass.

        Infinite where the candidate's predictions are not finite.

        Args:
            candidates: what is taken out.
            num_sequences: compare on the first so many; None: on all.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class DepthMethod(ModelMethod, ABC):
    """Takes blocks out of a model. A stage of its own in a recipe, before those that compress matrices.

    Attributes:
        num_dropped: how many blocks to take out.
        bridge: refit the sublayer before each gap to also do what is missing, by least squares on the calibration text
            (as in arXiv 2505.02819); a number: by a change of this rank. No parameter is added.
        num_sequences: how many calibration sequences to choose by; the bridge sees all of them.
    """

    num_dropped: int = 4
    bridge: bool | int = False
    num_sequences: int = 128

    def __post_init__(self) -> None:
        if self.num_dropped < 1:
            raise ValueError(f"num_dropped must be at least 1, not {self.num_dropped}")
        if self.num_sequences < 1:
            raise ValueError(f"num_sequences must be at least 1, not {self.num_sequences}")
        if not isinstance(self.bridge, bool) and self.bridge < 1:
            raise ValueError(f"bridge must be true, false or a rank of at least 1, not {self.bridge}")

    @property
    def bridge_rank(self) -> int | None:
        """Of what a bridge adds to a matrix; None: any."""
        return None if isinstance(self.bridge, bool) else self.bridge

    @abstractmethod
    def choose(self, probe: Probe) -> Cuts:
        """What to take out.

        Raises:
            ValueError: numbers that are not finite.
        """

    def check(self, num_blocks: int) -> None:
        """Raise ValueError if a model of so many blocks has too few."""
        if self.num_dropped >= num_blocks:
            raise ValueError(f"num_dropped is {self.num_dropped}, and the model has {num_blocks} blocks; drop fewer")

    def guess(self, num_blocks: int) -> Cuts:
        """Cuts of the kind and number that `choose` makes, for the planner."""
        return whole(range(num_blocks - self.num_dropped, num_blocks))

    @abstractmethod
    def passes(self, num_blocks: int) -> float:
        """Passes of the calibration text through the model that choosing takes, roughly; for the planner's estimate."""

    @property
    def window(self) -> int:
        """Consecutive blocks whose hidden states are compared, and held, at a time."""
        return 1

    def candidates(self, num_blocks: int) -> int:  # noqa: ARG002 - most methods ask for none
        """Most candidates that `choose` asks about at a time."""
        return 0


def whole(blocks: Iterable[int]) -> Cuts:
    """Cuts of whole blocks."""
    return frozenset(Cut(block) for block in blocks)


def least(losses: Sequence[float]) -> int:
    """The place of the smallest loss, the first of equals.

    Raises:
        ValueError: none is finite.
    """
    found = min(range(len(losses)), key=losses.__getitem__)
    if not isfinite(losses[found]):
        raise ValueError("whatever goes next, the predictions are not finite; take out less, or check the checkpoint")
    return found

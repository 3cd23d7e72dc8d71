"""How often a student learns from its own texts: GKD (arXiv 2306.13649), or as it needs, DistiLLM (2402.03898)."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from decoct.samples.lesson import Lesson

_RISE = 0.1  # of the threshold, each time that held-out text has become worse
_WORSE = 0.1  # nats by which it must have become so, DistiLLM's


class Source(Enum):
    """Where a step's texts come from."""

    TEXTS = "texts"
    FRESH = "fresh"
    REPLAY = "replay"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixing:
    """How often the student learns from its own texts.

    Attributes:
        share: of steps on the student's own texts (GKD's lambda; at first, where adaptive).
        adaptive: the share rises by 0.1 whenever the loss on held-out text has risen by 0.1, and texts are used again:
            of the steps on own texts fewer and fewer write new ones as training goes on (DistiLLM).
        capacity: texts that are kept to be used again.
        seed: of the choices.
    """

    share: float = 0.5
    adaptive: bool = False
    capacity: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"share must lie from 0 to 1, not {self.share:g}")
        if self.capacity < 1:
            raise ValueError(f"capacity must be at least 1, not {self.capacity}")

    @property
    def uses_own(self) -> bool:
        """Whether the student ever writes."""
        return self.adaptive or self.share > 0


class Mixer:
    """The same under way: what was written is kept, and the share follows the held-out text.

    Choices depend on the seed and the step alone, so a run that goes on from `state` chooses as it would have.

    Attributes:
        share: as it is now.
        kept: texts that may be used again, oldest first.
    """

    def __init__(self, rule: Mixing) -> None:
        self._rule = rule
        self.share = rule.share
        self.kept: list[Lesson] = []
        self._last: float | None = None

    def choose(self, step: int, total: int) -> Source:
        """Where the texts of a step, counted from 0, of `total` come from."""
        draw = self._random(step).random()
        if draw >= self.share:
            return Source.TEXTS
        filling = len(self.kept) < self._rule.capacity
        if not self._rule.adaptive or filling or draw < self.share * (1 - step / total):
            return Source.FRESH
        return Source.REPLAY

    def keep(self, lessons: Sequence[Lesson]) -> None:
        """Keep texts that the student has written; the oldest go where there are too many."""
        if self._rule.adaptive:
            self.kept = [*self.kept, *lessons][-self._rule.capacity :]

    def replay(self, step: int, count: int) -> list[Lesson]:
        """Some of the texts that are kept."""
        draws = self._random(step)
        draws.random()  # what `choose` took
        return draws.choices(self.kept, k=count)

    def judged(self, loss: float) -> None:
        """Take note of the loss on held-out text."""
        if self._rule.adaptive and self._last is not None and loss >= self._last + _WORSE:
            self.share = min(1.0, self.share + _RISE)
        self._last = loss

    def state(self) -> dict[str, Any]:
        """Everything that a later process needs, as JSON has it."""
        return {"share": self.share, "last": self._last, "kept": [asdict(lesson) for lesson in self.kept]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.share, self._last = float(state["share"]), state["last"]
        self.kept = [Lesson(**{**each, "tokens": tuple(each["tokens"])}) for each in state["kept"]]

    def _random(self, step: int) -> random.Random:
        return random.Random(self._rule.seed * 1_000_003 + step)  # noqa: S311 - no secrets here

"""How far training has come: what a checkpoint says beside its tensors."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from decoct.methods.training import TrainingMethod


@dataclass(slots=True)
class Progress:
    """What has happened so far.

    Attributes:
        total: steps that there will be.
        text: digest of the text.
        losses: of each step, nats a token, before it.
        looks: (steps done, loss on held-out text).
        seconds: spent in steps, over all processes.
        settled: whether `total` has been fitted to the minutes that are allowed.
        stopped: whether training is over before `total`.
        mixing: how often the student reads its own texts, and those that it keeps; empty where that is fixed.
    """

    total: int
    text: str
    losses: list[float] = field(default_factory=list)
    looks: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0
    settled: bool = False
    stopped: bool = False
    mixing: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, text: str) -> "Progress":
        """From a checkpoint's metadata."""
        found = cls(**json.loads(text))
        found.looks = [(int(step), float(loss)) for step, loss in found.looks]
        return found

    def written(self) -> str:
        """For a checkpoint's metadata."""
        return json.dumps(asdict(self))

    @property
    def over(self) -> bool:
        """Whether there is nothing left to do."""
        return self.stopped or len(self.losses) >= self.total

    @property
    def best(self) -> float:
        """The least loss on held-out text so far."""
        return min((loss for _, loss in self.looks), default=float("inf"))

    @property
    def left(self) -> float:
        """Seconds that the rest will take, about."""
        done = len(self.losses)
        return (self.total - done) * self.seconds / done if done else 0.0

    def settle(self, method: TrainingMethod, trial: int) -> None:
        """After `trial` steps: as many steps as the minutes allow, at the speed so far; and none after the time."""
        if method.minutes is None:
            return
        allowed = 60.0 * method.minutes
        if not self.settled and len(self.losses) >= trial:
            self.total = max(trial, min(self.total, int(allowed * len(self.losses) / self.seconds)))
            self.settled = True
        self.stopped = self.stopped or self.seconds >= allowed

    def lost_patience(self, patience: int) -> bool:
        """Whether the last looks were all worse than one before them."""
        if not patience or len(self.looks) <= patience:
            return False
        before = min(loss for _, loss in self.looks[:-patience])
        return min(loss for _, loss in self.looks[-patience:]) >= before

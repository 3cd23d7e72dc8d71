"""What is to be done, and who is told about it."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from decoct.engine.budget import Budget
from decoct.engine.data import Data
from decoct.engine.plan import Plan
from decoct.engine.stages import Stage
from decoct.engine.stream import OnEvent
from decoct.model import Model


@dataclass(frozen=True, slots=True)
class Job:
    """Everything that `compress_job` needs.

    Attributes:
        model: what to compress.
        stages: in order.
        data: calibration.
        budget: limits.
        out: output folder.
        fresh: discard what an unfinished run, or an earlier result of decoct, left there.
        accept: told what the job is expected to make, before it does anything; raises ValueError to refuse it.
        started: when work on it began, a search for its bits included, by `time.perf_counter()`.
    """

    model: Model
    stages: tuple[Stage, ...]
    data: Data
    budget: Budget
    out: Path
    fresh: bool = False
    accept: Callable[[Model], None] = field(default=lambda _: None)
    started: float = field(default_factory=time.perf_counter)


@dataclass(frozen=True, slots=True)
class Watch:
    """Where progress goes.

    Attributes:
        message: told one line at a time.
        planned: told each stage's plan before it runs, which stage it is, from 1, and how many there are.
        event: told of every finished part, and of every step of a stage that tunes the whole model.
        began: told in words what a search does next; the events that follow are of this.
    """

    message: Callable[[str], None] = field(default=lambda _: None)
    planned: Callable[[Plan, int, int], None] = field(default=lambda _, _number, _count: None)
    event: OnEvent = field(default=lambda _: None)
    began: Callable[[str], None] = field(default=lambda _: None)

"""What a run took and what it found on the way: decoct-run.json, and the Result that the API gives."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from decoct.engine.budget import peak_resident_bytes
from decoct.engine.stream import Event
from decoct.model import open_model
from decoct.store import RUN_SUMMARY, read_json, write_json

_NEIGHBOURS = 2  # blocks on either side that a block's error is compared with
_STANDS_OUT = 5.0  # times their median
_ALIKE = 0.05  # relative difference in bytes between blocks that are compared


@dataclass(frozen=True, slots=True)
class Result:
    """What a run made.

    Attributes:
        folder: the checkpoint.
        nbytes: bytes of its tensors.
        bits_per_weight: everything counted.
        seconds: of the process that finished it, searching included; a resumed run counts from the resumption.
        peak_bytes: most memory that this process held.
        errors: relative squared error of each part that was compressed, by part, of the last stage that streamed the
            blocks.
        losses: divergence from the model that the recipe began with, in nats a token, before each step of the last
            stage that tuned the whole model; empty if none did.
        outlying: blocks whose error is more than 5 times their neighbours', and how many times; see `outlying_blocks`.
        starved: slots that no calibration token reached in some stage; they were compressed without data.
    """

    folder: Path
    nbytes: int
    bits_per_weight: float
    seconds: float
    peak_bytes: int
    errors: dict[str, float]
    outlying: dict[str, float]
    losses: tuple[float, ...]
    starved: tuple[str, ...]


def write_summary(folder: Path, kinds: Sequence[str], events: Sequence[Sequence[Event]], started: float) -> None:
    """Write times, memory and errors apart from the checkpoint's own files, whose bits no interruption changes.

    Args:
        folder: the checkpoint.
        kinds: of each stage, as in `Plan.kind`.
        events: of each stage, those of parts and steps restored from an earlier process included.
        started: when this process began with it, by `time.perf_counter()`.
    """
    stages = [
        {
            "stage": kind,
            "steps": [_step(event) for event in found if event.loss is not None],
            "parts": [_part(event) for event in found if event.loss is None],
        }
        for kind, found in zip(kinds, events, strict=True)
    ]
    seconds = round(time.perf_counter() - started, 3)
    write_json(folder / RUN_SUMMARY, {"seconds": seconds, "peak_bytes": peak_resident_bytes(), "stages": stages})


def read_summary(folder: Path) -> dict[str, Any]:
    """decoct-run.json of a finished checkpoint: seconds, peak memory, and each stage's parts and steps."""
    return dict(read_json(folder / RUN_SUMMARY))


def read_result(folder: Path) -> Result:
    """The result of a run that is over.

    Raises:
        ValueError: the folder is no finished result.
    """
    summary, model = read_summary(folder), open_model(folder)
    streamed = [stage["parts"] for stage in summary["stages"] if any(part["error"] for part in stage["parts"])]
    tuned = [stage["steps"] for stage in summary["stages"] if stage["steps"]]
    last = streamed[-1] if streamed else []
    starved = [name for stage in summary["stages"] for part in stage["parts"] for name in part["starved"]]
    errors = {part["part"]: part["error"] for part in last if part["error"] is not None}
    return Result(
        folder=folder,
        nbytes=model.nbytes,
        bits_per_weight=model.bits_per_weight,
        seconds=summary["seconds"],
        peak_bytes=summary["peak_bytes"],
        errors=errors,
        outlying=dict(item for parts in streamed for item in outlying_blocks(parts).items()),
        losses=tuple(step["loss"] for step in tuned[-1]) if tuned else (),
        starved=tuple(dict.fromkeys(starved)),
    )


def outlying_blocks(parts: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Blocks with an error above 5 times their neighbours', and how many times it is.

    A block is compared with the median of the two nearest before and the two nearest after that take about as many
    bytes: others were compressed more or less on purpose.

    Args:
        parts: in order, as decoct-run.json lists them; those that are not blocks or lost nothing do not count.
    """
    blocks = [part for part in parts if part["part"].startswith("block ") and part["error"]]
    found = {}
    for number, block in enumerate(blocks):
        alike = [n for n, each in enumerate(blocks) if abs(each["nbytes"] / block["nbytes"] - 1) < _ALIKE]
        place = alike.index(number)
        near = alike[max(0, place - _NEIGHBOURS) : place] + alike[place + 1 : place + 1 + _NEIGHBOURS]
        if near:
            times = block["error"] / median(blocks[n]["error"] for n in near)
            if times > _STANDS_OUT:
                found[str(block["part"])] = times
    return found


def _part(event: Event) -> dict[str, Any]:
    return {
        "part": event.part,
        "error": event.error,
        "seconds": round(event.seconds, 3),
        "nbytes": event.nbytes,
        "starved": list(event.starved),
    }


def _step(event: Event) -> dict[str, Any]:
    return {"step": event.done, "loss": event.loss, "seconds": round(event.seconds, 3)}

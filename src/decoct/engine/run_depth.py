"""Taking blocks out of a model: choose, refit what is next to the gaps, write what is left. Every loss is on disk."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from decoct.engine.bridge import Bridging, bridges
from decoct.engine.copy import copy_parts
from decoct.engine.gaps import describe_cuts, describe_gaps, gaps_of
from decoct.engine.journal import Journal
from decoct.engine.probe import Measured, ModelProbe
from decoct.engine.shallow import ShallowModel, merged
from decoct.engine.stream import Event, OnEvent
from decoct.methods.depth import Cut, Cuts, DepthMethod
from decoct.model import Model
from decoct.store import read_json, write_json
from decoct.weights import Weight

_CHOSEN = "cuts.json"  # in the stage's folder: what is taken out
_LOSSES = "losses.jsonl"  # beside it: every loss that was measured on the way


@dataclass(frozen=True, slots=True)
class DepthPass:
    """Everything that taking blocks out needs.

    Attributes:
        method: how to choose.
        model: whose blocks.
        tokens: calibration.
        dtype: what blocks run in.
        at_once: candidates to try at a time.
        in_memory: whether the hidden states that bridges are fitted to stay in memory.
        folder: where shards go, and what is found on the way.
        scratch: where hidden states go.
        journal: what is done already.
        on_event: told of every candidate's loss and of every part that is written.
        message: told of what goes and of every gap, in words.
    """

    method: DepthMethod
    model: Model
    tokens: Int[Tensor, "sequences length"]
    dtype: torch.dtype
    at_once: int
    in_memory: bool
    folder: Path
    scratch: Path
    journal: Journal
    on_event: OnEvent
    message: Callable[[str], None]


@torch.no_grad()
def run_depth(todo: DepthPass) -> ShallowModel:
    """Do what an earlier process has not done yet; gives what is left, as it is written.

    Raises:
        ValueError: hidden states that are not finite.
    """
    left = ShallowModel.of(todo.model, _chosen(todo))
    todo.message(f"taken out: {', '.join(describe_cuts(left.cuts))}")
    new: dict[str, Weight] = {}
    if todo.method.bridge:
        rank, places = todo.method.bridge_rank, (todo.folder, todo.scratch)
        new = bridges(Bridging(left, todo.tokens, todo.dtype, rank, todo.in_memory, *places, todo.message))
    copy_parts(left, new, todo.folder, todo.journal, todo.on_event)
    return left


def describe_depth(left: ShallowModel, method: DepthMethod) -> dict[str, Any]:
    """What the lineage says of a stage: what is out, and what was done about it."""
    taken = {"taken_out": describe_cuts(left.cuts)}
    return {**taken, **describe_gaps(gaps_of(left))} if method.bridge else taken


def _chosen(todo: DepthPass) -> Cuts:
    """What the method chooses, or chose before."""
    path = todo.folder / _CHOSEN
    if not path.exists():
        known = _known(todo.folder / _LOSSES)
        note = _Notes(todo, time.perf_counter())
        tokens = todo.tokens[: todo.method.num_sequences]
        probe = ModelProbe(todo.model, tokens, todo.dtype, todo.at_once, known, note)
        cuts = merged(todo.method.choose(probe))
        write_json(path, {"cuts": _as_json(cuts)})
    return _from_json(read_json(path)["cuts"])


class _Notes:
    """Writes losses down as they become known, and shows them."""

    def __init__(self, todo: DepthPass, started: float) -> None:
        self._todo, self._started, self._count = todo, started, 0

    def __call__(self, found: Measured) -> None:
        now = time.perf_counter()
        with (self._todo.folder / _LOSSES).open("a", encoding="utf-8") as handle:
            for (cuts, sequences), loss in found.items():
                handle.write(json.dumps({"cuts": _as_json(cuts), "sequences": sequences, "loss": loss}) + "\n")
        self._count += len(found)
        best = min(found.values())
        part = f"{self._count} candidates tried"
        total = max(self._count, round(self._todo.method.passes(self._todo.model.num_blocks)))
        self._todo.on_event(Event(part, self._count, total, None, now - self._started, 0, loss=best))
        self._started = now


def _known(path: Path) -> Measured:
    """Losses that an earlier process measured; a last line that was cut short does not count."""
    found: Measured = {}
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    for line in whole:
        entry = json.loads(line)
        found[_from_json(entry["cuts"]), int(entry["sequences"])] = float(entry["loss"])
    if len(whole) < len(lines):
        path.write_text("".join(whole), encoding="utf-8")
    return found


def _as_json(cuts: Cuts) -> list[list[Any]]:
    return [[cut.block, cut.part] for cut in sorted(cuts)]


def _from_json(value: list[list[Any]]) -> Cuts:
    return frozenset(Cut(int(block), part) for block, part in value)

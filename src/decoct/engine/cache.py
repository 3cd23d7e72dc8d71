"""Saving a key-value cache policy with a model: what it learns from calibration, and the weights as they are."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from decoct.engine.journal import Journal
from decoct.engine.runner import Runner
from decoct.engine.stream import Event, OnEvent
from decoct.engine.write import contents, shard_name, write_shard
from decoct.methods import CacheMethod
from decoct.methods.policy import Learned, describe_policy
from decoct.model import Model
from decoct.store import read_json, write_json

_POLICY = "policy.json"  # in the stage's folder: what will stand in decoct.json


@dataclass(frozen=True, slots=True)
class CachePass:
    """Everything that saving a policy needs.

    Attributes:
        method: the policy.
        model: whose it becomes.
        tokens: calibration; None if the policy learns nothing.
        dtype: what blocks run in.
        folder: where shards go.
        journal: what is done already.
        on_event: told of every part that is written.
    """

    method: CacheMethod
    model: Model
    tokens: Int[Tensor, "sequences length"] | None
    dtype: torch.dtype
    folder: Path
    journal: Journal
    on_event: OnEvent


@torch.no_grad()
def run_cache(todo: CachePass) -> None:
    """Learn what is to be learned, unless an earlier process did, and write the shards that are missing.

    Raises:
        ValueError: keys or values that are not finite.
    """
    if not (todo.folder / _POLICY).exists():
        learned = () if todo.tokens is None else _learn(todo, todo.tokens)
        write_json(todo.folder / _POLICY, describe_policy(todo.method, learned))
    model, parts = todo.model, list(contents(todo.model))
    transposed = {name for name, slot in model.slots().items() if slot.transposed}
    for number, (part, slots, others) in enumerate(parts):
        started = time.perf_counter()
        if todo.journal.finished(part) is None:
            shard = todo.folder / shard_name(number, len(parts))
            weights = {name: model.weight(name) for name in slots}
            nbytes = write_shard(shard, weights, {name: model.tensor(name) for name in others}, transposed)
            todo.journal.finish(part, shard, error=None, nbytes=nbytes, starved=[])
        line = todo.journal.parts[part]
        seconds = time.perf_counter() - started
        todo.on_event(Event(part, number + 1, len(parts), None, seconds, line["nbytes"]))


def written_policy(folder: Path) -> Mapping[str, Any]:
    """What `run_cache` found, from the stage's folder."""
    return dict(read_json(folder / _POLICY))


class _Listener:
    """Stands where a cache stands, changes nothing, and adds keys and values to their statistics."""

    def __init__(self, stat: type[Any]) -> None:
        self._stat = stat
        self.keys: Any = None
        self.values: Any = None
        self.heads = 0

    def update(
        self, keys: Tensor, values: Tensor, layer: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """As they came."""
        del layer, args, kwargs
        rows = [tensor.transpose(1, 2).flatten(2).flatten(0, 1) for tensor in (keys, values)]
        if self.keys is None:
            self.keys, self.values = (self._stat.empty(each.shape[1]) for each in rows)
            self.heads = keys.shape[1]
        self.keys.add(rows[0])
        self.values.add(rows[1])
        return keys, values

    def mask(self, given: Tensor | None, num_tokens: int) -> Tensor | None:  # noqa: ARG002 - as a cache is asked
        """The model's own."""
        return given


def _learn(todo: CachePass, tokens: Int[Tensor, "sequences length"]) -> Learned:
    """Run the model block by block on the calibration text; the policy learns from each block's keys and values."""
    assert todo.method.stat is not None
    model, runner = todo.model, Runner(todo.model, todo.dtype)
    table = model.weight(model.family.embed).unpack(todo.dtype)
    hidden = torch.cat([runner.embed(sequence.unsqueeze(0), table) for sequence in tokens])
    size = runner.batch_size(*tokens.shape)
    learned = []
    for block in range(model.num_blocks):
        names = [model.prefix(block) + slot.name for slot in model.block_slots]
        laid = runner.lay_out(block, {name: model.weight(name) for name in names})
        listener = _Listener(todo.method.stat)
        for start in range(0, len(hidden), size):
            hidden[start : start + size] = runner.run(block, laid, hidden[start : start + size], listener)
        learned.append(todo.method.learn(listener.keys, listener.values, listener.heads))
    return tuple(learned)

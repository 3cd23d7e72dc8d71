"""Saving a key-value cache policy with a model: what it learns from calibration, and the weights as they are."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from decoct.engine.copy import copy_parts
from decoct.engine.gradients import Sweep
from decoct.engine.journal import Journal
from decoct.engine.runner import Runner
from decoct.engine.stream import Event, OnEvent
from decoct.methods import CacheMethod, Place
from decoct.methods.policy import Learned, describe_policy
from decoct.model import Model
from decoct.store import read_json, write_json

_POLICY = "policy.json"  # in the stage's folder: what will stand in decoct.json
_LEARNED = "learned-{}.json"  # beside it, while gradients run: what was learned of a block


@dataclass(frozen=True, slots=True)
class CachePass:
    """Everything that saving a policy needs.

    Attributes:
        method: the policy.
        model: whose it becomes.
        tokens: calibration; None if the policy learns nothing.
        dtype: what blocks run in.
        folder: where shards go, and what was learned of a block.
        scratch: for hidden states and gradients on the way.
        journal: what is done already.
        on_event: told of every part that is written.
    """

    method: CacheMethod
    model: Model
    tokens: Int[Tensor, "sequences length"] | None
    dtype: torch.dtype
    folder: Path
    scratch: Path
    journal: Journal
    on_event: OnEvent


@torch.no_grad()
def run_cache(todo: CachePass) -> None:
    """Learn what is to be learned, unless an earlier process did, and write the shards that are missing.

    Raises:
        ValueError: keys or values that are not finite.
    """
    if not (todo.folder / _POLICY).exists():
        learned: Learned = ()
        if todo.tokens is not None:
            learned = (_by_gradients if todo.method.by_gradients else _forwards)(todo, todo.tokens)
        write_json(todo.folder / _POLICY, describe_policy(todo.method, learned))
    copy_parts(todo.model, {}, todo.folder, todo.journal, todo.on_event)


def written_policy(folder: Path) -> Mapping[str, Any]:
    """What `run_cache` found, from the stage's folder."""
    return dict(read_json(folder / _POLICY))


class _Listener:
    """Stands where a cache stands, changes nothing, and keeps the keys and values that it was given last."""

    def __init__(self) -> None:
        self.seen: tuple[Tensor, Tensor] | None = None

    def update(
        self, keys: Tensor, values: Tensor, layer: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """As they came."""
        del layer, args, kwargs
        self.seen = (keys, values)
        return keys, values

    def mask(self, given: Tensor | None, num_tokens: int) -> Tensor | None:  # noqa: ARG002 - as a cache is asked
        """The model's own."""
        return given

    def last(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the last run."""
        assert self.seen is not None
        return self.seen


def _forwards(todo: CachePass, tokens: Int[Tensor, "sequences length"]) -> Learned:
    """Run the model block by block on the calibration text; the policy learns from each block's keys and values."""
    model, runner = todo.model, Runner(todo.model, todo.dtype)
    table = model.weight(model.family.embed).unpack(todo.dtype)
    hidden = runner.embed_all(tokens, table)
    size = runner.batch_size(*tokens.shape)
    learned = []
    for block, place in enumerate(_places(runner)):
        names = [model.prefix(block) + slot.name for slot in model.block_slots]
        laid = runner.lay_out(block, {name: model.weight(name) for name in names})
        listener, learner = _Listener(), todo.method.learner(place)
        for start in range(0, len(hidden), size):
            hidden[start : start + size] = runner.run(block, laid, hidden[start : start + size], listener)
            learner.add(*listener.last(), None)
        learned.append(learner.learned())
    return tuple(learned)


def _by_gradients(todo: CachePass, tokens: Int[Tensor, "sequences length"]) -> Learned:
    """The same with gradients of the model's own log-likelihood, from the last block to the first.

    What is learned of a block is on disk before the gradient by its input counts as done, so that an interrupted run
    goes on there.
    """
    model, last = todo.model, todo.model.num_blocks
    todo.scratch.mkdir(parents=True, exist_ok=True)
    sweep = Sweep(model, tokens, todo.dtype, todo.scratch)
    places = _places(sweep.runner)

    def find(block: int) -> None:
        listener, learner = _Listener(), todo.method.learner(places[block])
        for slopes in sweep.through_block(block, sweep.given(block), listener.last, listener):
            keys, values = (each.detach() for each in listener.last())
            learner.add(keys, values, (slopes[0], slopes[1]))
        learned = {name: tensor.tolist() for name, tensor in learner.learned().items()}
        write_json(todo.folder / _LEARNED.format(block), learned)

    for part, number, seconds in sweep.backwards(0, find):
        todo.on_event(Event(part, number, last + 1, None, seconds, 0))
    found = [read_json(todo.folder / _LEARNED.format(block)) for block in range(last)]
    return tuple({name: torch.tensor(numbers) for name, numbers in each.items()} for each in found)


def _places(runner: Runner) -> list[Place]:
    return [Place(block, each.sliding_window, each.frequencies) for block, each in enumerate(runner.attentions())]

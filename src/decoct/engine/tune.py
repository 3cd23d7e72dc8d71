"""End-to-end tuning of a compressed model's real numbers: the loop, the gradient block by block, checkpoints."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from decoct.engine.journal import Journal
from decoct.engine.runner import Runner
from decoct.engine.stream import Event, OnEvent
from decoct.engine.write import contents, shard_name, write_shard
from decoct.methods.quantize.e2e_qp import E2EQP, RelativeAdam
from decoct.model import PART, Model
from decoct.ops.divergence import kl_and_slope
from decoct.store import open_safetensors, save_safetensors
from decoct.weights import Dense, Rotated, Weight, for_training, pull_back, trainable

CHECKPOINT = "tuning.safetensors"
"""The unfinished tuning's state in a stage's folder."""

LOGITS_AT_ONCE = 1 << 25
"""Entries of the logits that are held in float32 at a time."""

_SAVE_SECONDS = 60.0  # least time between two checkpoints


@dataclass(frozen=True, slots=True)
class Tuning:
    """Everything that one tuning needs.

    Attributes:
        method: settings.
        model: what to tune.
        teacher: the model whose predictions are wanted.
        tokens: calibration.
        dtype: what blocks run in.
        folder: where shards and checkpoints go.
        journal: what is done already.
        on_event: told of every step, then of every part that is written.
    """

    method: E2EQP
    model: Model
    teacher: Model
    tokens: Int[Tensor, "sequences length"]
    dtype: torch.dtype
    folder: Path
    journal: Journal
    on_event: OnEvent


def run_tuning(todo: Tuning) -> None:
    """Tune, or go on where an earlier process stopped, and write the result's shards.

    Raises:
        ValueError: the loss or a gradient is not finite.
    """
    parts = list(contents(todo.model))
    tuner = None if all(todo.journal.finished(part) for part, _, _ in parts) else Tuner(todo)
    losses = _losses(todo.folder / CHECKPOINT)
    for step, loss in enumerate(losses):
        todo.on_event(_step_event(todo, step, loss, 0.0))
    if tuner is not None:
        tuner.run(losses)
    for number, (part, slots, others) in enumerate(parts):
        started = time.perf_counter()
        if todo.journal.finished(part) is None:
            assert tuner is not None
            tuner.write(part, number, slots, others)
        line = todo.journal.parts[part]
        seconds = time.perf_counter() - started
        todo.on_event(Event(part, number + 1, len(parts), None, seconds, line["nbytes"]))


class Tuner:
    """The compressed model, what is learned about it, and the model whose predictions are wanted."""

    def __init__(self, todo: Tuning) -> None:
        self._todo = todo
        model = todo.model
        self._runner, self._teacher = Runner(model, todo.dtype), _Teacher(todo.teacher, todo.dtype)
        self._weights = {name: for_training(model.weight(name)) for name in model.slots()}
        parts = (*range(model.num_blocks), None)
        self._others = {name: model.tensor(name) for block in parts for name in model.others(block)}
        first = {
            f"{name}{PART}{part}": tensor
            for name, weight in self._weights.items()
            if name in model.described and not _is_only_rotated(weight)
            for part, tensor in trainable(weight).items()
        }
        if todo.method.norms:
            first.update({name: self._others[name] for name in vectors(model)})
        self.adam = RelativeAdam(first)
        # What outlives a block is allocated once: small tensors left between large ones that go would scatter memory.
        self._gradients = {name: torch.zeros(tensor.shape) for name, tensor in first.items()}

    def run(self, losses: list[float]) -> None:
        """Do the steps that are left after those with these losses."""
        todo = self._todo
        self._restore(len(losses))
        losses, saved = [*losses], time.perf_counter()
        for step in range(len(losses), todo.method.num_steps):
            begun = time.perf_counter()
            loss, gradients = self.gradients(todo.tokens[self._batch(step)])
            if not loss < float("inf"):
                raise ValueError("the tuned model's loss is not finite; lower e2e_qp.learning_rate")
            self.adam.step(gradients, step, todo.method.rate(step))
            losses.append(loss)
            if step + 1 == todo.method.num_steps or time.perf_counter() - saved > _SAVE_SECONDS:
                self._save(losses)
                saved = time.perf_counter()
            todo.on_event(_step_event(todo, step, loss, time.perf_counter() - begun))

    @torch.no_grad()
    def gradients(self, tokens: Int[Tensor, "batch seq"]) -> tuple[float, dict[str, Tensor]]:
        """Mean divergence from the teacher, and its gradient by every tensor that is tuned, until the next call.

        Blocks are unpacked one at a time: forwards only what enters each is kept, backwards each is run again, and what
        entered it is replaced by the gradient.
        """
        model, runner = self._todo.model, self._runner
        for gradients in self._gradients.values():
            gradients.zero_()
        hidden = runner.embed(tokens, self._matrix(model.family.embed), self._given(None))
        states = torch.empty(model.num_blocks + 1, *hidden.shape, dtype=hidden.dtype)
        states[0] = hidden
        for block in range(model.num_blocks):
            states[block + 1] = runner.run(block, runner.lay_out_given(block, self._given(block)), states[block])
        loss = self._through_head(tokens, states[-1])
        for block in reversed(range(model.num_blocks)):
            self._through_block(block, states[block], states[block + 1])
        self._through_embedding(tokens, states[0])
        return loss, self._gradients

    def write(self, part: str, number: int, slots: list[str], others: list[str]) -> None:
        """Save a part of the tuned model and note it in the journal."""
        todo, model = self._todo, self._todo.model
        transposed = {name for name, slot in model.slots().items() if slot.transposed}
        shard = todo.folder / shard_name(number, model.num_blocks + 2)
        vectors = {name: self.adam.value(name) if name in self.adam else self._others[name] for name in others}
        weights = {name: self._tuned(name, model.weight(name)) for name in slots}
        nbytes = write_shard(shard, weights, vectors, transposed)
        todo.journal.finish(part, shard, error=None, nbytes=nbytes, starved=[])

    def _through_head(self, tokens: Int[Tensor, "batch seq"], state: Float[Tensor, "batch seq hidden"]) -> float:
        """Mean divergence; `state`, the last block's output, becomes its gradient, a few tokens at a time."""
        name = _head(self._todo.model)
        wanted = self._teacher.run(tokens)
        given = self._given(None)
        head = given[name] = self._matrix(name)
        leaves = self._leaves(given)
        sums = {key: torch.zeros_like(leaf) for key, leaf in leaves.items()}
        total, at_once = 0.0, max(1, LOGITS_AT_ONCE // head.shape[0])
        others = {key: tensor for key, tensor in given.items() if key != name}
        for row in range(state.shape[0]):
            for start in range(0, state.shape[1], at_once):
                part = (slice(row, row + 1), slice(start, start + at_once))
                piece = state[part].clone().requires_grad_()
                with torch.enable_grad():
                    logits = self._runner.logits(piece, head, others)
                loss, slope = kl_and_slope(logits[0].detach(), self._teacher.logits(wanted[part])[0])
                slope = slope.div_(tokens.numel()).to(logits.dtype).unsqueeze(0)
                state[part], *parts = _grad(logits, [piece, *leaves.values()], slope)
                for key, each in zip(leaves, parts, strict=True):
                    sums[key] += each
                total += loss
        self._collect(sums)
        return total / tokens.numel()

    def _through_block(
        self, block: int, state: Float[Tensor, "batch seq hidden"], gradient: Float[Tensor, "batch seq hidden"]
    ) -> None:
        """`state`, a block's input, becomes the gradient by it, given that by the block's output."""
        given = self._given(block)
        leaves = self._leaves(given)
        x = state.clone().requires_grad_()
        with torch.enable_grad():
            y = self._runner.run(block, self._runner.lay_out_given(block, given), x)
        state[:], *parts = _grad(y, [x, *leaves.values()], gradient)
        self._collect(dict(zip(leaves, parts, strict=True)))

    def _through_embedding(self, tokens: Int[Tensor, "batch seq"], gradient: Float[Tensor, "batch seq hidden"]) -> None:
        name = self._todo.model.family.embed
        given = self._given(None)
        table = given[name] = self._matrix(name)
        leaves = self._leaves(given)
        others = {key: tensor for key, tensor in given.items() if key != name}
        with torch.enable_grad():
            x = self._runner.embed(tokens, table, others)
        if x.requires_grad:  # else the table was left alone, and no vector comes before the first block
            self._collect(dict(zip(leaves, _grad(x, list(leaves.values()), gradient), strict=True)))

    def _given(self, block: int | None) -> dict[str, Tensor]:
        """A block's tensors as they are now, unpacked, by checkpoint name; None: tuned vectors outside the blocks."""
        model, dtype = self._todo.model, self._todo.dtype
        if block is None:
            return {name: self.adam.value(name).to(dtype) for name in model.others(None) if name in self.adam}
        given = {
            model.prefix(block) + slot.name: self._matrix(model.prefix(block) + slot.name) for slot in model.block_slots
        }
        for name in model.others(block):
            given[name] = (self.adam.value(name) if name in self.adam else self._others[name]).to(dtype)
        return given

    def _leaves(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those of these tensors that gradients are wanted for; made ready for it."""
        return {name: tensor.requires_grad_() for name, tensor in given.items() if self._keys(name)}

    def _collect(self, gradients: Mapping[str, Tensor]) -> None:
        """Add the gradients of matrices and vectors to those of what is stored."""
        for name, gradient in gradients.items():
            if name not in self._weights:
                self._gradients[name] += gradient
                continue
            for part, each in pull_back(self._current(name), gradient).items():
                self._gradients[f"{name}{PART}{part}"] += each

    def _matrix(self, name: str) -> Float[Tensor, "out in"]:
        return self._current(name).unpack(self._todo.dtype)

    def _current(self, name: str) -> Weight:
        """A slot's weight with its real numbers as they are now."""
        return self._tuned(name, self._weights[name])

    def _tuned(self, name: str, weight: Weight) -> Weight:
        """A slot's weight, in whichever form, with its real numbers as they are now."""
        tuned = {part: self.adam.value(key) for part, key in self._keys(name).items()}
        return weight.with_tensors({**weight.tensors(), **tuned})

    def _keys(self, name: str) -> dict[str, str]:
        """What is tuned of a slot, or of a vector, by its name in the weight."""
        if name not in self._weights:
            return {name: name} if name in self.adam else {}
        keys = {part: f"{name}{PART}{part}" for part in self._weights[name].tensors()}
        return {part: key for part, key in keys.items() if key in self.adam}

    def _batch(self, step: int) -> list[int]:
        """Sequence numbers of a step: a new order for every pass over the data, the same for the same seed."""
        count, size = self._todo.tokens.shape[0], self._todo.method.batch_size
        found = []
        for position in range(step * size, (step + 1) * size):
            generator = torch.Generator().manual_seed(self._todo.method.seed + position // count)
            found.append(int(torch.randperm(count, generator=generator)[position % count]))
        return found

    def _save(self, losses: list[float]) -> None:
        tensors = {f"{kind}:{name}": t for kind, values in self.adam.state.items() for name, t in values.items()}
        save_safetensors(self._todo.folder / CHECKPOINT, tensors, {"losses": json.dumps(losses)})

    def _restore(self, num_steps: int) -> None:
        """Take up the last checkpoint, if there is one."""
        if num_steps:
            saved = open_safetensors(self._todo.folder / CHECKPOINT)
            for kind, values in self.adam.state.items():
                values.update({name: saved.read(f"{kind}:{name}") for name in values})


class _Teacher:
    """The model whose predictions are wanted, unpacked once and for all."""

    def __init__(self, model: Model, dtype: torch.dtype) -> None:
        self._model, self._runner = model, Runner(model, dtype)
        self._ends = {slot.name: model.weight(slot.name).unpack(dtype) for slot in model.end_slots}
        self._blocks = []
        for block in range(model.num_blocks):
            names = [model.prefix(block) + slot.name for slot in model.block_slots]
            self._blocks.append(self._runner.lay_out(block, {name: model.weight(name) for name in names}))

    def run(self, tokens: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch seq hidden"]:
        """The last block's output."""
        hidden = self._runner.embed(tokens, self._ends[self._model.family.embed])
        for block, laid in enumerate(self._blocks):
            hidden = self._runner.run(block, laid, hidden)
        return hidden

    def logits(self, hidden: Float[Tensor, "batch seq hidden"]) -> Float[Tensor, "batch seq vocab"]:
        """Logits of that."""
        return self._runner.logits(hidden, self._ends[_head(self._model)])


def vectors(model: Model) -> list[str]:
    """Names of a model's norms and biases, in and outside the blocks."""
    everywhere = (*range(model.num_blocks), None)
    return [name for block in everywhere for name in model.others(block) if len(model.shape(name)) == 1]


def _is_only_rotated(weight: Weight) -> bool:
    """Whether a matrix was left uncompressed, and is merely read through a rotation."""
    return isinstance(weight, Rotated) and isinstance(weight.inner, Dense)


def _head(model: Model) -> str:
    """The slot that projects to logits: lm_head, or the embedding that it is tied to."""
    return model.end_slots[-1].name


def _grad(y: Tensor, inputs: list[Tensor], gradient: Tensor) -> list[Tensor]:
    """Gradients by these inputs; zero by those that were not used."""
    found: tuple[Tensor | None, ...] = torch.autograd.grad(y, inputs, gradient, allow_unused=True)
    return [torch.zeros_like(x) if each is None else each for x, each in zip(inputs, found, strict=True)]


def _step_event(todo: Tuning, step: int, loss: float, seconds: float) -> Event:
    return Event(f"step {step + 1}", step + 1, todo.method.num_steps, None, seconds, 0, loss=loss)


def _losses(path: Path) -> list[float]:
    """The losses of the steps that a checkpoint comes after."""
    return list(json.loads(open_safetensors(path).metadata["losses"])) if path.exists() else []

"""End-to-end tuning of a compressed model's real numbers: the loop, its memory, its checkpoints."""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from decoct.engine.budget import Budget, compute_dtype, product_rate, resident_bytes
from decoct.engine.data import Data, check_length
from decoct.engine.journal import Journal
from decoct.engine.plan import FIXED, MARGIN, Group, Plan, check_disk, too_large
from decoct.engine.runner import Runner
from decoct.engine.stream import Event, OnEvent
from decoct.engine.write import shard_name, write_shard
from decoct.methods.quantize.e2e_qp import E2EQP, divergence, unit
from decoct.model import Model
from decoct.store import open_safetensors, save_safetensors
from decoct.weights import Weight, pull_back, trainable

_STATE = "tuning.safetensors"
_SAVE_SECONDS = 60.0  # least time between two checkpoints
_LOGITS_AT_ONCE = 1 << 25  # entries of the logits that are held in float32 at a time
_BETAS, _EPS = (0.9, 0.95), 1e-8


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
        on_event: told of every step.
    """

    method: E2EQP
    model: Model
    teacher: Model
    tokens: Int[Tensor, "sequences length"]
    dtype: torch.dtype
    folder: Path
    journal: Journal
    on_event: OnEvent


def plan_tuning(
    model: Model, method: E2EQP, data: Data, budget: Budget, out: Path | None, dtype: torch.dtype | None = None
) -> Plan:
    """Predict what tuning takes.

    Raises:
        ValueError: nothing to tune, a calibration that is too long for the model, or too little memory or disk.
    """
    if not model.described:
        raise ValueError(f"{model.source.label} has no compressed weights; put e2e_qp after a stage that compresses")
    check_length(data, model)
    dtype = dtype or compute_dtype(model.dtype)
    dense = model.num_parameters * dtype.itemsize
    moved = sum(_real_entries(model, name) for name in model.slots())
    hidden = model.shape(model.family.embed)[1]
    batch = method.batch_size * data.sequence_length
    widths = sum(sum(model.shape(model.prefix(0) + slot.name)) for slot in model.block_slots)
    graph = batch * (model.num_blocks * hidden + 4 * widths) * dtype.itemsize
    logits = 5 * 4 * min(_LOGITS_AT_ONCE, batch * model.shape(model.family.embed)[0])
    working = 3 * dense + model.nbytes + 20 * moved + graph + logits
    limit = budget.host_limit()
    peak = int(MARGIN * (resident_bytes() + FIXED + working))
    if peak > limit:
        raise ValueError(too_large(model, peak, limit, working))
    if out is not None:
        check_disk(out, model.nbytes, budget.scratch, 12 * moved)
    entries = sum(prod(model.shape(name)) for name in model.slots())
    operations = 10.0 * entries * batch * method.num_steps
    names = [name for name in model.slots() if name in model.described]
    return Plan(
        steps=(),
        groups=(Group("every compressed role", len(names), sum(prod(model.shape(n)) for n in names), (method,)),),
        num_parameters=model.num_parameters,
        needs_data=True,
        dtype=dtype,
        in_memory=True,
        peak_bytes=peak,
        limit_bytes=limit,
        output_bytes=model.nbytes,
        scratch_bytes=12 * moved,
        seconds=operations / (0.5 * product_rate(dtype)),
    )


def run_tuning(todo: Tuning) -> None:
    """Tune, or go on where an earlier process stopped, and write the result's shards.

    Raises:
        ValueError: the loss is not finite.
    """
    if all(todo.journal.finished(part) for part in _parts(todo.model)):
        return
    _Tuner(todo).run()


class _Tuner:
    """The model unpacked, what is learned about it, and the position."""

    def __init__(self, todo: Tuning) -> None:
        self._todo = todo
        model = todo.model
        self._runner, self._teacher = Runner(model, todo.dtype), Runner(todo.teacher, todo.dtype)
        self._weights: dict[str, Weight] = {name: model.weight(name) for name in model.slots()}
        self._vectors = {n: model.tensor(n) for b in range(model.num_blocks) for n in model.others(b)}
        self._teacher_blocks = [_laid(self._teacher, block) for block in range(model.num_blocks)]
        first = {
            f"{name}/{part}": tensor
            for name, weight in self._weights.items()
            if name in model.described and name != model.family.embed
            for part, tensor in trainable(weight).items()
        }
        if todo.method.norms:
            first.update({name: tensor for name, tensor in self._vectors.items() if tensor.is_floating_point()})
        self._first = first
        self._units = {name: unit(tensor) for name, tensor in first.items()}
        self._moved = {name: torch.zeros_like(u) for name, u in self._units.items()}
        self._moments = tuple({name: torch.zeros_like(u) for name, u in self._units.items()} for _ in range(2))

    @torch.no_grad()
    def run(self) -> None:
        todo = self._todo
        start = self._restore()
        saved = time.perf_counter()
        for step in range(start, todo.method.num_steps):
            begun = time.perf_counter()
            loss = self._step(step)
            last = step + 1 == todo.method.num_steps
            if last or time.perf_counter() - saved > _SAVE_SECONDS:
                self._save_state(step + 1)
                saved = time.perf_counter()
            seconds = time.perf_counter() - begun
            todo.on_event(Event(f"step {step + 1}", step + 1, todo.method.num_steps, loss, seconds, 0))
        self._write()

    def _step(self, step: int) -> float:
        """One step of Adam on one batch; gives the mean divergence before it."""
        todo, runner = self._todo, self._runner
        batch = todo.tokens[self._batch(step)]
        matrices = {name: self._current(name).unpack(todo.dtype) for name in todo.model.slots()}
        vectors = {name: self._value(name).to(todo.dtype) for name in self._vectors}
        inside = [n for n in (*matrices, *vectors) if n.startswith(todo.model.family.blocks)]
        leaves = {name: (matrices.get(name, vectors.get(name))) for name in inside}
        tensors: dict[str, Tensor] = {name: leaf for name, leaf in leaves.items() if leaf is not None}
        for tensor in tensors.values():
            tensor.requires_grad_(tensor.is_floating_point())
        hidden = runner.embed(batch, matrices[todo.model.family.embed])
        with torch.enable_grad():
            for block in range(todo.model.num_blocks):
                hidden = _checkpointed(runner, block, tensors, hidden)
        head = todo.model.family.embed if todo.model.tied else todo.model.family.head
        loss, gradient = self._loss(batch, hidden.detach(), matrices[head])
        if not loss < float("inf"):
            raise ValueError("the tuned model's loss is not finite; lower e2e_qp.learning_rate")
        torch.autograd.backward([hidden], [gradient])
        self._update(tensors, step)
        return loss

    def _loss(self, batch: Tensor, hidden: Tensor, head: Tensor) -> tuple[float, Tensor]:
        """Mean divergence from the teacher, and its gradient by the last block's output, a few tokens at a time."""
        family, teacher = self._todo.teacher.family, self._teacher
        wanted = teacher.embed(batch, self._todo.teacher.weight(family.embed).unpack(self._todo.dtype))
        for block, laid in enumerate(self._teacher_blocks):
            wanted = teacher.run(block, laid, wanted)
        their_head = family.embed if self._todo.teacher.tied else family.head
        their_matrix = self._todo.teacher.weight(their_head).unpack(self._todo.dtype)
        total, count = 0.0, batch.numel()
        gradient = torch.empty_like(hidden)
        at_once = max(1, _LOGITS_AT_ONCE // head.shape[0])
        for row in range(batch.shape[0]):
            for start in range(0, batch.shape[1], at_once):
                part = (slice(row, row + 1), slice(start, start + at_once))
                piece = hidden[part].requires_grad_()
                with torch.enable_grad():
                    logits = self._runner.logits(piece, head)
                loss, slope = divergence(logits[0].detach(), teacher.logits(wanted[part], their_matrix)[0])
                total += loss
                (gradient[part],) = torch.autograd.grad(logits, piece, (slope / count).to(logits.dtype).unsqueeze(0))
        return total / count, gradient

    def _update(self, tensors: dict[str, Tensor], step: int) -> None:
        """Adam, in units of each entry's size."""
        rate = self._todo.method.rate(step)
        fade = [1.0 - beta ** (step + 1) for beta in _BETAS]
        for name, tensor in tensors.items():
            if tensor.grad is None:
                continue
            found = {name: tensor.grad.float()}
            if name in self._weights:
                pulled = pull_back(self._current(name), tensor.grad)
                found = {f"{name}/{part}": gradient for part, gradient in pulled.items()}
            for key, gradient in found.items():
                if key not in self._moved:
                    continue
                g = gradient * self._units[key]
                mean, square = (moments[key] for moments in self._moments)
                mean.lerp_(g, 1.0 - _BETAS[0])
                square.lerp_(g.square(), 1.0 - _BETAS[1])
                self._moved[key].sub_(rate * (mean / fade[0]) / ((square / fade[1]).sqrt() + _EPS))

    def _value(self, key: str) -> Tensor:
        """A tuned tensor as it would be stored now, or a constant as it is."""
        if key not in self._moved:
            return self._vectors[key]
        first = self._first[key]
        return (first.float() + self._moved[key] * self._units[key]).to(first.dtype)

    def _current(self, name: str) -> Weight:
        weight = self._weights[name]
        keys = {part: f"{name}/{part}" for part in weight.tensors() if f"{name}/{part}" in self._moved}
        if not keys:
            return weight
        return weight.with_tensors({**weight.tensors(), **{part: self._value(key) for part, key in keys.items()}})

    def _batch(self, step: int) -> list[int]:
        """Sequence numbers of a step: a new order for every pass over the data, the same for the same seed."""
        count, size = self._todo.tokens.shape[0], self._todo.method.batch_size
        found = []
        for position in range(step * size, (step + 1) * size):
            generator = torch.Generator().manual_seed(self._todo.method.seed + position // count)
            found.append(int(torch.randperm(count, generator=generator)[position % count]))
        return found

    def _save_state(self, step: int) -> None:
        kinds = {"moved": self._moved, "mean": self._moments[0], "square": self._moments[1]}
        tensors = {f"{kind}:{name}": t for kind, values in kinds.items() for name, t in values.items()}
        save_safetensors(self._todo.folder / _STATE, tensors, {"step": json.dumps(step)})

    def _restore(self) -> int:
        """Take up the last checkpoint; gives the step to go on with."""
        path = self._todo.folder / _STATE
        if not path.exists():
            return 0
        saved = open_safetensors(path)
        kinds = {"moved": self._moved, "mean": self._moments[0], "square": self._moments[1]}
        for kind, values in kinds.items():
            for name in values:
                values[name] = saved.read(f"{kind}:{name}")
        return int(json.loads(saved.metadata["step"]))

    def _write(self) -> None:
        todo = self._todo
        model, total = todo.model, todo.model.num_blocks + 2
        transposed = {name for name, slot in model.slots().items() if slot.transposed}
        for number, (part, slots, others) in enumerate(_contents(model)):
            if todo.journal.finished(part):
                continue
            shard = todo.folder / shard_name(number, total)
            vectors = {name: self._value(name) if name in self._vectors else model.tensor(name) for name in others}
            nbytes = write_shard(shard, {name: self._current(name) for name in slots}, vectors, transposed)
            todo.journal.finish(part, shard, error=None, nbytes=nbytes, starved=[])


def _contents(model: Model) -> Iterator[tuple[str, list[str], list[str]]]:
    """Each part's name, slots and other tensors, as a streamed pass divides a model."""
    head = [slot.name for slot in model.end_slots if slot.role == "lm_head"]
    yield "embedding", [model.family.embed], []
    for block in range(model.num_blocks):
        yield f"block {block}", [model.prefix(block) + slot.name for slot in model.block_slots], model.others(block)
    yield "lm_head", head, model.others(None)


def _parts(model: Model) -> list[str]:
    return [part for part, _, _ in _contents(model)]


def _laid(runner: Runner, block: int) -> dict[str, Tensor]:
    model = runner.model
    names = [model.prefix(block) + slot.name for slot in model.block_slots]
    return runner.lay_out(block, {name: model.weight(name) for name in names})


def _checkpointed(runner: Runner, block: int, tensors: dict[str, Tensor], hidden: Tensor) -> Tensor:
    """A block's output; what lies inside is computed again for the gradient instead of being kept."""
    prefix = runner.model.prefix(block)
    mine = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    run: Callable[[Tensor], Tensor] = partial(runner.run, block, runner.lay_out_given(block, mine))
    return checkpoint(run, hidden, use_reentrant=False)  # type: ignore[no-any-return]


def _real_entries(model: Model, name: str) -> int:
    if name not in model.described:
        return 0
    return sum(tensor.numel() for tensor in trainable(model.weight(name)).values())

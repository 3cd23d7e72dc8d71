"""Learning a model's rotations: the loop, the gradient block by block, a checkpoint. The fold itself is rotate.py's.

A small further turn D of the residual stream makes W·Dᵀ of each matrix that reads it, and D·W of each that writes it.
So the gradient by D, at D = 1, is gᵀ·W or g·Wᵀ, with g that by the matrix as it is now; likewise for a head's values.
"""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from decoct.arch import Slot
from decoct.engine.plan_basis import LOGITS_AT_ONCE
from decoct.engine.rotate import Basis, RotatedModel
from decoct.engine.runner import Runner
from decoct.engine.stream import Event, OnEvent
from decoct.methods.rotate.spinquant import SpinQuant
from decoct.ops.cayley import cayley_step
from decoct.ops.divergence import surprise_and_slope
from decoct.ops.hadamard import hadamard
from decoct.ops.rotation import Turn
from decoct.ops.rounding import rounded_tokens
from decoct.store import open_safetensors, save_safetensors

ROTATIONS = "rotations.safetensors"
"""What has been learned so far, in a stage's folder."""

_SAVE_SECONDS = 60.0  # least time between two checkpoints


@dataclass(frozen=True, slots=True)
class Learning:
    """Everything that learning needs.

    Attributes:
        method: settings.
        model: in the basis where learning starts.
        tokens: calibration.
        dtype: what blocks run in.
        folder: where the checkpoint goes.
        on_event: told of every step.
    """

    method: SpinQuant
    model: RotatedModel
    tokens: Int[Tensor, "sequences length"]
    dtype: torch.dtype
    folder: Path
    on_event: OnEvent


@dataclass(slots=True)
class _Torque:
    """Gradients of the loss by further turns: of the residual stream, of each block's values."""

    residual: Float[Tensor, "n n"]
    values: list[Float[Tensor, "head head"]] = field(default_factory=list)


@torch.no_grad()
def learned_basis(todo: Learning) -> Basis:
    """Learn, or go on where an earlier process stopped.

    Raises:
        ValueError: the loss is not finite.
    """
    learner = _Learner(todo)
    losses = learner.restore()
    for step, loss in enumerate(losses):
        todo.on_event(_step_event(todo, step, loss, 0.0))
    saved = time.perf_counter()
    for step in range(len(losses), todo.method.num_steps):
        begun = time.perf_counter()
        loss = learner.step(step)
        losses.append(loss)
        if step + 1 == todo.method.num_steps or time.perf_counter() - saved > _SAVE_SECONDS:
            learner.save(losses)
            saved = time.perf_counter()
        todo.on_event(_step_event(todo, step, loss, time.perf_counter() - begun))
    return learner.model.basis


class _Learner:
    """The model in the basis learned so far."""

    def __init__(self, todo: Learning) -> None:
        self._todo = todo
        basis, method = todo.model.basis, todo.method
        residual = None if basis.residual is None else Turn(matrix=basis.residual.dense())
        self._use(Basis(residual, tuple(Turn(matrix=turn.dense()) for turn in basis.values)))
        self._runner = Runner(todo.model, todo.dtype)
        slots = todo.model.block_slots
        paths = self._runner.reader_paths()
        widths = {slot.name: todo.model.shape(todo.model.prefix(0) + slot.name)[1] for slot in slots}
        self._signs = {
            paths[slot.name]: method.signs(widths[slot.name]).to(todo.dtype) if slot.role in todo.model.online else None
            for slot in slots
        }

    def step(self, number: int) -> float:
        """One step; gives the loss before it."""
        method, basis = self._todo.method, self.model.basis
        loss, torque = self.torque(self._todo.tokens[self._batch(number)])
        if not loss < float("inf"):
            raise ValueError("the loss of the rotated model is not finite; the checkpoint or the text is damaged")
        rate = method.rate(number)
        residual = None if basis.residual is None else _moved(basis.residual, torque.residual, rate)
        pairs = zip(basis.values, torque.values, strict=True)
        self._use(Basis(residual, tuple(_moved(turn, each, rate) for turn, each in pairs)))
        return loss

    def torque(self, tokens: Int[Tensor, "batch seq"]) -> tuple[float, _Torque]:
        """The mean next-token loss of the model with rounded inputs, and its gradients by further turns."""
        model, runner = self.model, self._runner
        width = model.shape(model.family.embed)[1]
        head = self._head if model.basis.values else 0
        found = _Torque(torch.zeros(width, width), [torch.zeros(head, head) for _ in model.basis.values])
        hidden = runner.embed(tokens, model.weight(model.family.embed).unpack(self._todo.dtype))
        states = torch.empty(model.num_blocks + 1, *hidden.shape, dtype=hidden.dtype)
        states[0] = hidden
        for block in range(model.num_blocks):
            states[block + 1] = self._run(block, self._given(block), states[block])
        loss = self._through_head(tokens, states[-1], found)
        gradient = states[-1].clone()
        for block in reversed(range(model.num_blocks)):
            gradient = self._through_block(block, states[block], gradient, found)
        if model.basis.residual is not None:  # a token's row of the embedding is turned as the row itself is
            found.residual += gradient.reshape(-1, width).float().T @ hidden.reshape(-1, width).float()
        return loss, found

    def save(self, losses: list[float]) -> None:
        """Write what has been learned; atomic."""
        basis = self.model.basis
        turns = {"residual": basis.residual, **{f"values.{i}": turn for i, turn in enumerate(basis.values)}}
        tensors = {name: turn.matrix for name, turn in turns.items() if turn is not None and turn.matrix is not None}
        save_safetensors(self._todo.folder / ROTATIONS, tensors, {"losses": json.dumps(losses)})

    def restore(self) -> list[float]:
        """Take up what an earlier process learned; gives the losses of its steps."""
        path = self._todo.folder / ROTATIONS
        if not path.exists():
            return []
        saved, count = open_safetensors(path), len(self.model.basis.values)
        residual = Turn(matrix=saved.read("residual")) if "residual" in saved.tensors else None
        self._use(Basis(residual, tuple(Turn(matrix=saved.read(f"values.{i}")) for i in range(count))))
        return list(json.loads(saved.metadata["losses"]))

    def _use(self, basis: Basis) -> None:
        self.model = replace(self._todo.model, basis=basis)
        self._head = self.model.family.head_size(self.model.config) if basis.values else 0

    def _given(self, block: int) -> dict[str, Tensor]:
        """A block's tensors in the present basis, by full name."""
        model, prefix = self.model, self.model.prefix(block)
        slots = {prefix + slot.name: model.weight(prefix + slot.name) for slot in model.block_slots}
        given = {name: weight.unpack(self._todo.dtype) for name, weight in slots.items()}
        return {**given, **{name: model.tensor(name).to(self._todo.dtype) for name in model.others(block)}}

    def _run(self, block: int, given: Mapping[str, Tensor], x: Tensor) -> Tensor:
        method, module = self._todo.method, self._runner.skeleton.blocks[block]
        with _rounding_inputs(module, self._signs, method):
            return self._runner.run(block, self._runner.lay_out_given(block, given), x)

    def _through_block(self, block: int, state: Tensor, gradient: Tensor, found: _Torque) -> Tensor:
        """The gradient by a block's input, given that by its output; matrices add theirs to the turns'."""
        given, prefix = self._given(block), self.model.prefix(block)
        leaves: dict[str, tuple[Slot, Tensor]] = {}
        for slot in self.model.block_slots:
            name = prefix + slot.name
            bias = name.removesuffix("weight") + "bias"
            leaves[name] = (slot, given[name].requires_grad_())
            if bias in given:
                leaves[bias] = (replace(slot, reads=""), given[bias].requires_grad_())
        x = state.clone().requires_grad_()
        with torch.enable_grad():
            y = self._run(block, given, x)
        tensors = [tensor for _, tensor in leaves.values()]
        of_input, *parts = torch.autograd.grad(y, [x, *tensors], gradient, materialize_grads=True)
        for (slot, tensor), each in zip(leaves.values(), parts, strict=True):
            self._add(block, slot, tensor.detach().float(), each.float(), found)
        return of_input

    def _add(self, block: int, slot: Slot, matrix: Tensor, gradient: Tensor, found: _Torque) -> None:
        """What a matrix, or a bias (as a matrix of one column that reads nothing), has to say about the turns."""
        matrix, gradient = (each if each.ndim > 1 else each.unsqueeze(1) for each in (matrix, gradient))
        model = self.model
        if model.basis.residual is not None:
            if slot.reads in model.stream.norms:
                found.residual += gradient.T @ matrix
            if slot.writes == "resid":
                found.residual += gradient @ matrix.T
        if model.basis.values and slot.role == "attn.v":
            heads = (each.reshape(-1, self._head, each.shape[1]) for each in (gradient, matrix))
            found.values[block] += torch.einsum("hri,hsi->rs", *heads)
        if model.basis.values and slot.role == "attn.o" and slot.reads:
            found.values[block] += gradient.reshape(-1, self._head).T @ matrix.reshape(-1, self._head)

    def _through_head(self, tokens: Int[Tensor, "batch seq"], state: Tensor, found: _Torque) -> float:
        """The mean loss; `state`, the last block's output, becomes its gradient, some tokens at a time."""
        model = self.model
        head = model.weight(model.end_slots[-1].name).unpack(self._todo.dtype)
        total, count = 0.0, tokens.shape[0] * (tokens.shape[1] - 1)
        at_once = max(1, LOGITS_AT_ONCE // head.shape[0])
        of_head = torch.zeros(head.shape)
        for row in range(tokens.shape[0]):
            for start in range(0, tokens.shape[1] - 1, at_once):
                stop = min(start + at_once, tokens.shape[1] - 1)
                piece, leaf = state[row : row + 1, start:stop].clone().requires_grad_(), head.detach().requires_grad_()
                with torch.enable_grad():
                    logits = self._runner.logits(piece, leaf)[0]
                loss, change = surprise_and_slope(logits.detach(), tokens[row, start + 1 : stop + 1])
                total += loss / count
                slope, part = torch.autograd.grad(logits, [piece, leaf], change.div_(count).to(logits.dtype))
                state[row, start:stop] = slope[0]
                of_head += part
            state[row, -1] = 0
        if model.basis.residual is not None:
            found.residual += of_head.T @ head.float()
        return total

    def _batch(self, step: int) -> list[int]:
        """Sequence numbers of a step: a new order for every pass over the data, the same for the same seed."""
        method, count = self._todo.method, self._todo.tokens.shape[0]
        found = []
        for position in range(step * method.batch_size, (step + 1) * method.batch_size):
            generator = torch.Generator().manual_seed(method.seed + position // count)
            found.append(int(torch.randperm(count, generator=generator)[position % count]))
        return found


def _moved(turn: Turn, torque: Float[Tensor, "n n"], rate: float) -> Turn:
    """A turn after one step, given the gradient by a further turn; that by the matrix itself is torque·Q."""
    assert turn.matrix is not None
    return Turn(matrix=cayley_step(turn.matrix, torque.double() @ turn.matrix, rate)[0])


@contextmanager
def _rounding_inputs(module: nn.Module, signs: Mapping[str, Tensor | None], method: SpinQuant) -> Iterator[None]:
    """While the body runs a block, its matrices read rounded inputs; `signs`: of those turned before, by path."""
    hooks = [
        module.get_submodule(path).register_forward_pre_hook(partial(_rounded, method, turned))
        for path, turned in signs.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _rounded(
    method: SpinQuant, signs: Tensor | None, _: nn.Module, arguments: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    x, *rest = arguments
    if signs is None:
        return rounded_tokens(x, method.bits, method.clip_ratio), *rest
    turned = rounded_tokens(hadamard((x * signs).float()), method.bits, method.clip_ratio)
    return hadamard(turned, inverse=True).to(x.dtype) * signs, *rest


def _step_event(todo: Learning, step: int, loss: float, seconds: float) -> Event:
    return Event(f"step {step + 1}", step + 1, todo.method.num_steps, None, seconds, 0, loss=loss)

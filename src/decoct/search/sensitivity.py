"""What rounding each matrix costs, from gradients: half the squared change of the log-likelihood (a Fisher estimate).

To second order the divergence that a change D of a matrix causes is the mean over sequences of ½·⟨G, D⟩², G the
gradient of the log-likelihood of labels that the model itself draws: the Fisher information is the Hessian of KL at
zero. Here ⟨G, D⟩² is taken row by row and summed: the errors of different rows are unrelated, so the terms between them
are noise that a few sequences would not average out. Within a row everything counts, how features and tokens go
together included, which is what GPTQ's errors depend on; a diagonal would not see it.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from decoct.engine.activations import Activations
from decoct.engine.runner import Runner
from decoct.engine.stream import Event, OnEvent
from decoct.search.candidates import Candidates
from decoct.search.measure import LOGITS_AT_ONCE
from decoct.search.target import Target

Costs = dict[str, dict[int, float]]
"""Nats a token, by full slot name and bits."""

GRADIENTS_BYTES = 1 << 28
"""Of gradients that wait for the candidates of one block, but at least one sequence's."""


def row_cost(gradient: Float[Tensor, "out in"], change: Float[Tensor, "out in"]) -> float:
    """½·Σ over rows of ⟨G_row, D_row⟩², of one sequence."""
    return 0.5 * float((gradient * change).sum(1).double().square().sum())


def find_costs(
    target: Target,
    candidates: Candidates,
    tokens: Int[Tensor, "sequences length"],
    seed: int,
    folder: Path,
    known: Costs,
    save: Callable[[Costs], None],
    on_event: OnEvent,
) -> Costs:
    """Estimate what each candidate costs; one block is in memory at a time, hidden states are on disk.

    Goes on where an earlier process stopped: `folder` holds the hidden states and the gradient so far, `known` the
    costs that were saved.

    Args:
        target: what is searched.
        candidates: the compressed matrices.
        tokens: calibration.
        seed: of the labels.
        folder: for hidden states and gradients.
        known: costs of the blocks that are done.
        save: called with all costs so far after every block.
        on_event: told of every block.

    Raises:
        ValueError: gradients that are not finite.
    """
    return _Fisher(target, candidates, tokens, seed, folder, known, save, on_event).run()


class _Fisher:
    """The position of one sweep forwards and one backwards."""

    def __init__(
        self,
        target: Target,
        candidates: Candidates,
        tokens: Tensor,
        seed: int,
        folder: Path,
        known: Costs,
        save: Callable[[Costs], None],
        on_event: OnEvent,
    ) -> None:
        self._target, self._model, self._candidates, self._tokens = target, target.model, candidates, tokens
        self._seed, self._folder, self._costs, self._save, self._on_event = seed, folder, dict(known), save, on_event
        self._runner = Runner(self._model, torch.float32)
        self._searched = set(target.names)
        self._head_name = self._model.end_slots[-1].name  # lm_head, or the embedding that it is tied to

    @torch.no_grad()
    def run(self) -> Costs:
        last = self._model.num_blocks
        self._folder.mkdir(parents=True, exist_ok=True)
        self._forwards()
        for block in reversed(range(-1, self._done_down_to())):
            started = time.perf_counter()
            if block == last:
                part, found = "lm_head", self._head()
            elif block >= 0:
                part, found = f"block {block}", self._block(block)
            else:
                part, found = "embedding", self._embedding()
            if block < 0:  # the caller saves what is whole; a tied embedding's two ends are added only once
                for name, each in found.items():
                    before = self._costs.get(name, {})
                    self._costs[name] = {bits: cost + before.get(bits, 0.0) for bits, cost in each.items()}
            else:
                self._gradient.commit(block)
                self._costs.update(found)
                self._save(self._costs)
                self._states("gradient").discard(block + 1)
                self._states("probe").discard(block + 1)
            seconds = time.perf_counter() - started
            self._on_event(Event(f"gradients, {part}", last - block + 1, last + 2, None, seconds, 0))
        return self._costs

    def _done_down_to(self) -> int:
        """The block (lm_head: one more than the last) that an earlier process did last: gradient kept, costs known."""
        last = self._model.num_blocks
        for block in range(last + 1):
            prefix = self._model.prefix(block) if block < last else self._head_name
            known = all(name in self._costs for name in self._searched if name.startswith(prefix))
            if known and self._states("gradient").path(block).exists():
                return block
        return last + 1

    def _forwards(self) -> None:
        """Save what enters each block, and what leaves the last one."""
        model, runner, count = self._model, self._runner, len(self._tokens)
        done = [b for b in range(model.num_blocks + 1) if self._states("probe").path(b).exists()]
        if any(self._states("gradient").path(b).exists() for b in range(model.num_blocks + 1)):
            return
        if not done:
            states = self._states("probe")
            table = model.weight(model.family.embed).unpack(torch.float32)
            states.begin()
            for row in range(count):
                states.write(row, runner.embed(self._tokens[row : row + 1], table))
            states.commit(0)
        for block in range(max(done, default=0), model.num_blocks):
            states = self._states("probe").resume(block)
            laid = runner.lay_out_given(block, self._given(block))
            states.begin()
            for row in range(count):
                states.write(row, runner.run(block, laid, states.read(row, row + 1)))
            states.commit(block + 1)

    def _head(self) -> Costs:
        """From sampled labels to the gradient by the last block's output; costs of the projection if it is searched."""
        name, states = self._head_name, self._states("probe").resume(self._model.num_blocks)
        head = self._model.weight(name).unpack(torch.float32)
        searched = name in self._searched
        at_once = max(1, LOGITS_AT_ONCE // head.shape[0])
        costs: Costs = {}
        self._begin_gradient()
        for row in range(len(self._tokens)):
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + row)
            hidden = states.read(row, row + 1)
            total = torch.zeros_like(head) if searched else None
            for start in range(0, hidden.shape[1], at_once):
                part = slice(start, start + at_once)
                piece = hidden[:, part].clone().requires_grad_()
                leaf = head.detach().requires_grad_(searched)
                with torch.enable_grad():
                    logits = self._runner.logits(piece, leaf)
                slope = _label_gradient(logits.detach()[0], generator).unsqueeze(0)
                found = _gradients(logits, [piece, leaf] if searched else [piece], slope)
                hidden[:, part] = found[0]
                if total is not None:
                    total += found[1]
            self._gradient.write(row, hidden)
            if total is not None:
                self._add(costs, {name: [total]})
        return costs

    def _block(self, block: int) -> Costs:
        """The gradient by a block's input, and the costs of its matrices."""
        names = [self._model.prefix(block) + slot.name for slot in self._model.block_slots]
        searched = [name for name in names if name in self._searched]
        given = self._given(block)
        states, behind = self._states("probe").resume(block), self._states("gradient").resume(block + 1)
        nbytes = sum(given[name].nbytes for name in searched)
        at_once = max(1, GRADIENTS_BYTES // nbytes) if searched else len(self._tokens)
        costs: Costs = {}
        self._begin_gradient()
        leaves = {name: given[name].requires_grad_() for name in searched}
        for start in range(0, len(self._tokens), at_once):
            waiting: dict[str, list[Tensor]] = {name: [] for name in searched}
            for row in range(start, min(start + at_once, len(self._tokens))):
                x = states.read(row, row + 1).requires_grad_()
                with torch.enable_grad():
                    y = self._runner.run(block, self._runner.lay_out_given(block, given), x)
                slope, *each = _gradients(y, [x, *leaves.values()], behind.read(row, row + 1))
                if not torch.isfinite(slope.sum()):
                    raise ValueError(f"block {block}: gradients are not finite; the checkpoint or the text is damaged")
                self._gradient.write(row, slope)
                for name, gradient in zip(searched, each, strict=True):
                    waiting[name].append(gradient)
            self._add(costs, waiting)
        return costs

    def _embedding(self) -> Costs:
        name = self._model.family.embed
        costs: Costs = {}
        if name not in self._searched:
            return costs
        table = self._model.weight(name).unpack(torch.float32).requires_grad_()
        behind = self._states("gradient").resume(0)
        for row in range(len(self._tokens)):
            with torch.enable_grad():
                x = self._runner.embed(self._tokens[row : row + 1], table)
            self._add(costs, {name: _gradients(x, [table], behind.read(row, row + 1))})
        return costs

    def _add(self, costs: Costs, gradients: Mapping[str, Sequence[Tensor]]) -> None:
        """Add what some sequences' gradients say of each candidate, in nats a token of all sequences."""
        for name, found in gradients.items():
            original = self._model.weight(name).unpack(torch.float32)
            sums = costs.setdefault(name, dict.fromkeys(self._target.widths, 0.0))
            for bits in self._target.widths:
                change = self._candidates.weight(name, bits).unpack(torch.float32).sub_(original)
                sums[bits] += sum(row_cost(each, change) for each in found) / self._tokens.numel()

    def _given(self, block: int) -> dict[str, Tensor]:
        """All of a block's tensors, unpacked, by checkpoint name."""
        model = self._model
        names = [model.prefix(block) + slot.name for slot in model.block_slots]
        given = {name: model.weight(name).unpack(torch.float32) for name in names}
        return given | {name: model.tensor(name).float() for name in model.others(block)}

    def _begin_gradient(self) -> None:
        self._gradient = self._states("gradient")
        self._gradient.begin()

    def _states(self, name: str) -> Activations:
        width = self._model.shape(self._model.family.embed)[1]
        shape = (*self._tokens.shape, width)
        return Activations(self._folder, shape, torch.float32, in_memory=False, name=name)


def _label_gradient(logits: Float[Tensor, "tokens vocab"], generator: torch.Generator) -> Float[Tensor, "tokens vocab"]:
    """Gradient of the negative log-likelihood of labels that these logits themselves draw, one a token."""
    chances = torch.softmax(logits.float(), dim=-1)
    labels = torch.multinomial(chances, 1, generator=generator)
    return chances.scatter_add_(1, labels, torch.full(labels.shape, -1.0))


def _gradients(y: Tensor, inputs: list[Tensor], slope: Tensor) -> list[Tensor]:
    """Gradients by these inputs; zero by those that were not used, as an expert's that no token went to."""
    found: tuple[Tensor | None, ...] = torch.autograd.grad(y, inputs, slope, allow_unused=True)
    return [torch.zeros_like(x) if each is None else each for x, each in zip(inputs, found, strict=True)]

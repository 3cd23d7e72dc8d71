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

from decoct.engine.gradients import Sweep, gradients
from decoct.engine.stream import Event, OnEvent
from decoct.search.candidates import Candidates
from decoct.search.settings import Level
from decoct.search.target import Target

Costs = dict[str, dict[Level, float]]
"""Nats a token, by full slot name and level."""

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
        self._sweep = Sweep(self._model, tokens, torch.float32, folder)
        self._searched = set(target.names)
        self._head_name = self._model.end_slots[-1].name  # lm_head, or the embedding that it is tied to

    @torch.no_grad()
    def run(self) -> Costs:
        last = self._model.num_blocks
        self._folder.mkdir(parents=True, exist_ok=True)
        self._sweep.forwards()
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
                    self._costs[name] = {level: cost + before.get(level, 0.0) for level, cost in each.items()}
            else:
                self._sweep.commit(block)
                self._costs.update(found)
                self._save(self._costs)
                self._sweep.discard(block)
            seconds = time.perf_counter() - started
            self._on_event(Event(f"gradients, {part}", last - block + 1, last + 2, None, seconds, 0))
        return self._costs

    def _done_down_to(self) -> int:
        """The block (lm_head: one more than the last) that an earlier process did last: gradient kept, costs known."""
        last = self._model.num_blocks
        for block in range(last + 1):
            prefix = self._model.prefix(block) if block < last else self._head_name
            known = all(name in self._costs for name in self._searched if name.startswith(prefix))
            if known and self._sweep.reached(block):
                return block
        return last + 1

    def _head(self) -> Costs:
        """Costs of the projection, if it is searched."""
        name = self._head_name
        head = self._model.weight(name).unpack(torch.float32)
        costs: Costs = {}
        for gradient in self._sweep.through_head(head, self._seed, of_head=name in self._searched):
            if gradient is not None:
                self._add(costs, {name: [gradient]})
        return costs

    def _block(self, block: int) -> Costs:
        """Costs of a block's matrices; gradients wait for their candidates, several sequences' together."""
        names = [self._model.prefix(block) + slot.name for slot in self._model.block_slots]
        searched = [name for name in names if name in self._searched]
        given = self._sweep.given(block)
        nbytes = sum(given[name].nbytes for name in searched)
        at_once = max(1, GRADIENTS_BYTES // nbytes) if searched else len(self._tokens)
        costs: Costs = {}
        leaves = [given[name].requires_grad_() for name in searched]
        waiting: dict[str, list[Tensor]] = {name: [] for name in searched}
        for row, each in enumerate(self._sweep.through_block(block, given, lambda: leaves)):
            for name, gradient in zip(searched, each, strict=True):
                waiting[name].append(gradient)
            if (row + 1) % at_once == 0 or row + 1 == len(self._tokens):
                self._add(costs, waiting)
                waiting = {name: [] for name in searched}
        return costs

    def _embedding(self) -> Costs:
        name = self._model.family.embed
        costs: Costs = {}
        if name not in self._searched:
            return costs
        table = self._model.weight(name).unpack(torch.float32).requires_grad_()
        behind = self._sweep.behind(-1)
        for row in range(len(self._tokens)):
            with torch.enable_grad():
                x = self._sweep.runner.embed(self._tokens[row : row + 1], table)
            self._add(costs, {name: gradients(x, [table], behind.read(row, row + 1))})
        return costs

    def _add(self, costs: Costs, found: Mapping[str, Sequence[Tensor]]) -> None:
        """Add what some sequences' gradients say of each candidate, in nats a token of all sequences."""
        for name, gradients_of in found.items():
            original = self._model.weight(name).unpack(torch.float32)
            sums = costs.setdefault(name, dict.fromkeys(self._target.levels, 0.0))
            for level in self._target.levels:
                change = self._candidates.weight(name, level).unpack(torch.float32).sub_(original)
                sums[level] += sum(row_cost(each, change) for each in gradients_of) / self._tokens.numel()

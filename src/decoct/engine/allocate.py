"""How much each block is pruned, where a recipe leaves that to OWL: one run of the model as it is, before the pass."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from decoct.engine.budget import product_rate
from decoct.engine.data import Data
from decoct.engine.record import record
from decoct.engine.rules import Assignment, Method, Resolved
from decoct.engine.runner import Runner, running_nbytes
from decoct.engine.stream import Event, OnEvent
from decoct.methods import Guided
from decoct.methods.pruning import Pruning
from decoct.model import Model
from decoct.ops.outlier_share import outlier_share, spread_sparsities
from decoct.stats import ColumnNorm
from decoct.store import read_json, write_json

_SHARES = "outliers.json"  # in the stage's folder: every block's share of outlying weights


@dataclass(frozen=True, slots=True)
class Allocating:
    """Everything that allocating needs.

    Attributes:
        model: as the pass finds it.
        tokens: calibration.
        dtype: what blocks run in.
        folder: where the shares are kept.
        on_event: told of every block.
    """

    model: Model
    tokens: Int[Tensor, "sequences length"]
    dtype: torch.dtype
    folder: Path
    on_event: OnEvent


@dataclass(frozen=True, slots=True)
class AllocationPlan:
    """What finding the blocks' shares takes, before the pass.

    Attributes:
        model: as the pass finds it.
    """

    model: Model

    def working_bytes(self, data: Data, dtype: torch.dtype) -> int:
        """The calibration's hidden states, and a block that runs."""
        states = data.num_tokens * self.model.shape(self.model.family.embed)[1] * dtype.itemsize
        largest = max(prod(self.model.shape(name)) for name in self.model.slots())
        return states + running_nbytes(self.model, dtype) + 4 * largest

    def seconds(self, data: Data, dtype: torch.dtype) -> float:
        """One run of the model."""
        return 2.0 * self.model.num_parameters * data.num_tokens / (0.5 * product_rate(dtype))


def allocation_plan(model: Model, steps: tuple[Resolved, ...]) -> AllocationPlan | None:
    """What allocating takes; None if no step leaves the blocks' sparsities to OWL."""
    return AllocationPlan(model) if allocates(steps) else None


def allocates(steps: tuple[Resolved, ...]) -> bool:
    """Whether any step leaves the blocks' sparsities to OWL."""
    methods = (method for step in steps if isinstance(step, Assignment) for method in step.methods.values())
    return any(_by_owl(method) is not None for method in methods)


def _by_owl(method: object) -> Pruning | None:
    """The pruning method, guided or not, whose sparsity is left to OWL; None: there is none."""
    plain = method.method if isinstance(method, Guided) else method
    return plain if isinstance(plain, Pruning) and plain.owl > 0 else None


def allocated(steps: tuple[Resolved, ...], todo: Allocating) -> tuple[Resolved, ...]:
    """The same steps, every block with a sparsity of its own where they leave it to OWL."""
    path = todo.folder / _SHARES
    if not path.exists():
        write_json(path, {"shares": _shares(todo)})
    shares = [float(share) for share in read_json(path)["shares"]]
    return tuple(_with_own(step, shares, todo.model) if isinstance(step, Assignment) else step for step in steps)


def _with_own(step: Assignment, shares: list[float], model: Model) -> Assignment:
    methods: dict[str, Method] = dict(step.methods)
    own_of: dict[tuple[Pruning, int], float] = {}
    for kind, blocks in _blocks_of(step, model).items():
        found = spread_sparsities([shares[block] for block in blocks], kind.sparsity, kind.owl)
        own_of |= {(kind, block): own for block, own in zip(blocks, found, strict=True)}
    for block in range(model.num_blocks):
        for slot in model.block_slots:
            name = model.prefix(block) + slot.name
            method = methods.get(name)
            pruning = _by_owl(method)
            if pruning is None:
                continue
            with_own = replace(pruning, sparsity=own_of[pruning, block], owl=0.0)
            methods[name] = replace(method, method=with_own) if isinstance(method, Guided) else with_own
    return replace(step, methods=methods)


def _blocks_of(step: Assignment, model: Model) -> dict[Pruning, list[int]]:
    """The blocks in which each method prunes: on average over these it is to meet its sparsity."""
    found: dict[Pruning, list[int]] = {}
    for block in range(model.num_blocks):
        names = (model.prefix(block) + slot.name for slot in model.block_slots)
        here = {_by_owl(step.methods.get(name)) for name in names}
        for pruning in here:
            if pruning is not None:
                found.setdefault(pruning, []).append(block)
    return found


@torch.no_grad()
def _shares(todo: Allocating) -> list[float]:
    """Of outlying weights, by block."""
    model, runner = todo.model, Runner(todo.model, todo.dtype)
    table = model.weight(model.family.embed).unpack(todo.dtype)
    hidden = runner.embed_all(todo.tokens, table)
    size = runner.batch_size(*todo.tokens.shape)
    slots = [slot for slot in model.block_slots if not slot.protected]
    wanted = {slot.reads: frozenset({ColumnNorm}) for slot in slots}
    found = []
    for block in range(model.num_blocks):
        weights = {
            model.prefix(block) + slot.name: model.weight(model.prefix(block) + slot.name) for slot in model.block_slots
        }
        laid = runner.lay_out(block, weights)
        model.prefetch(block + 1)
        module = runner.skeleton.blocks[block]
        with record(module, runner.edges, wanted, runner.edge_widths(), runner.reader_paths()) as recorder:
            for start in range(0, len(hidden), size):
                hidden[start : start + size] = runner.run(block, laid, hidden[start : start + size])
        norms = _norms(recorder.stats)
        reached = [slot for slot in slots if slot.reads in norms]  # not experts that no token came to
        matrices = [weights[model.prefix(block) + slot.name].unpack() for slot in reached]
        found.append(outlier_share(matrices, [norms[slot.reads] for slot in reached]))
        todo.on_event(Event(f"block {block}, outliers", block + 1, model.num_blocks, None, 0.0, 0))
    return found


def _norms(stats: Mapping[str, Mapping[type, ColumnNorm]]) -> dict[str, Tensor]:
    """Of the edges that any token reached."""
    return {edge: kinds[ColumnNorm].norm() for edge, kinds in stats.items() if kinds[ColumnNorm].num_tokens}

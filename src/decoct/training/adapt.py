"""A stage that puts an adapter's low-rank terms beside a model's matrices, one part in memory at a time."""

import hashlib
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from typing_extensions import override

from decoct.engine.plan import Plan, StepRules, make_plan
from decoct.engine.rules import Rule
from decoct.engine.stages import Before, OwnStage, StageRun
from decoct.engine.stream import Event
from decoct.engine.write import contents, shard_name, write_shard
from decoct.exporters.peft import TENSORS, Term, read_adapter, read_ranks
from decoct.methods import LinearMethod, name_of
from decoct.methods.heal.adapter import Adapter
from decoct.weights import Sum, Weight


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside(LinearMethod):
    """A term of some rank beside a matrix. For plans: all zeros.

    Attributes:
        rank: its rank.
    """

    rank: int

    @override
    def compress(self, weight: Weight, stat: Any) -> Weight:
        out, cols = weight.shape
        return with_term(weight, Term(torch.zeros(out, self.rank), torch.zeros(self.rank, cols)))


@dataclass(frozen=True)
class AdaptStage(OwnStage):
    """Makes sums of matrices and an adapter's terms.

    Attributes:
        method: settings.
        description: the stage as the recipe spells it.
    """

    method: Adapter
    description: dict[str, Any]

    @property
    def folder(self) -> Path:
        """Where the adapter lies."""
        return Path(self.method.folder).expanduser()

    @override
    def plan(self, before: Before) -> Plan:
        read_adapter(self.folder, before.model)
        plan = make_plan(before.model, self.steps(), before.data, before.budget, before.dtype, before.passes)
        return replace(plan, kind=name_of(self.method))

    @override
    def steps(self) -> tuple[StepRules, ...]:
        ranks = read_ranks(self.folder)
        return (
            tuple(
                Rule(tuple(f"{module}.weight" for module in ranks if ranks[module] == rank), Beside(rank=rank))
                for rank in sorted(set(ranks.values()))
            ),
        )

    @override
    def run(self, given: StageRun) -> dict[str, Any]:
        model, terms = given.model, read_adapter(self.folder, given.model)
        parts = list(contents(model))
        transposed = {name for name, slot in model.slots().items() if slot.transposed}
        for number, (part, slots, others) in enumerate(parts):
            started = time.perf_counter()
            if given.journal.finished(part) is None:
                shard = given.folder / shard_name(number, len(parts))
                weights = {name: model.weight(name) for name in slots}
                weights |= {name: with_term(weights[name], terms[name]) for name in slots if name in terms}
                nbytes = write_shard(shard, weights, {name: model.tensor(name) for name in others}, transposed)
                given.journal.finish(part, shard, error=None, nbytes=nbytes, starved=[])
            nbytes = given.journal.parts[part]["nbytes"]
            given.on_event(Event(part, number + 1, len(parts), None, time.perf_counter() - started, nbytes))
        return {"adapter": hashlib.sha256((self.folder / TENSORS).read_bytes()).hexdigest()[:16]}


def with_term(weight: Weight, term: Term) -> Weight:
    """The sum of a weight and a term."""
    terms = weight.terms if isinstance(weight, Sum) else (weight,)
    return Sum.of(*terms, term.weight(weight.dtype))

"""What a recipe consists of, and the plan of all of it: a hopeless recipe is refused before its first stage runs."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from decoct.engine.budget import Budget
from decoct.engine.data import Data, check_source
from decoct.engine.disk import check_disk, most_on_disk
from decoct.engine.fewer_experts import FewerExperts
from decoct.engine.journal import Journal
from decoct.engine.notes import with_notes
from decoct.engine.plan import Plan, StepRules, make_plan
from decoct.engine.plan_cache import plan_cache
from decoct.engine.plan_depth import plan_depth
from decoct.engine.plan_experts import plan_experts
from decoct.engine.plan_tuning import plan_tuning
from decoct.engine.plan_width import narrowed, plan_width
from decoct.engine.reshaped import Reshaped
from decoct.engine.rotate import rotated
from decoct.engine.sliced import plan_slicing
from decoct.engine.stream import OnEvent
from decoct.methods import CacheMethod
from decoct.methods.depth import DepthMethod
from decoct.methods.experts import ExpertMethod
from decoct.methods.policy import describe_policy, policy_settings, read_policy
from decoct.methods.prune.slicegpt import SliceGPT
from decoct.methods.quantize.e2e_qp import E2EQP
from decoct.methods.width import WidthMethod
from decoct.model import Model


@dataclass(frozen=True, slots=True)
class BlocksStage:
    """A streamed pass over the blocks.

    Attributes:
        steps: rules or a block method each; all steps run on a block while it is in memory.
        description: the stage as the recipe spells it.
    """

    steps: tuple[StepRules, ...]
    description: dict[str, Any]


@dataclass(frozen=True, slots=True)
class ModelStage:
    """A method on the whole model.

    Attributes:
        method: what to do.
        description: the stage as the recipe spells it.
    """

    method: E2EQP
    description: dict[str, Any]


@dataclass(frozen=True, slots=True)
class CacheStage:
    """A policy for keys and values, saved with the model; weights stay as they are.

    Attributes:
        method: the policy.
        description: the stage as the recipe spells it.
    """

    method: CacheMethod
    description: dict[str, Any]


@dataclass(frozen=True, slots=True)
class DepthStage:
    """Blocks, or parts of them, are taken out; what is left stays as it is.

    Attributes:
        method: how to choose them.
        description: the stage as the recipe spells it.
    """

    method: DepthMethod
    description: dict[str, Any]


@dataclass(frozen=True, slots=True)
class WidthStage:
    """MLP neurons and attention heads are taken out of every block, in one streamed pass.

    Attributes:
        method: how to choose them.
        description: the stage as the recipe spells it.
    """

    method: WidthMethod
    description: dict[str, Any]


@dataclass(frozen=True, slots=True)
class SliceStage:
    """Hidden states lose their least principal components.

    Attributes:
        method: how many.
        description: the stage as the recipe spells it.
    """

    method: SliceGPT
    description: dict[str, Any]


@dataclass(frozen=True, slots=True)
class ExpertStage:
    """Experts of every block are taken out or merged, in one streamed pass.

    Attributes:
        method: how to choose them.
        description: the stage as the recipe spells it.
    """

    method: ExpertMethod
    description: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Before:
    """What a stage that plans itself has before it.

    Attributes:
        model: what it begins with, in the shapes that it has by then.
        original: what the recipe begins with.
        data: calibration.
        budget: limits.
        plans: of the stages before it.
        passes: the steps of each of the recipe's passes before it.
        dtype: what to compute in; None: whatever this machine does fastest.
    """

    model: Model
    original: Model
    data: Data
    budget: Budget
    plans: tuple[Plan, ...]
    passes: tuple[tuple[StepRules, ...], ...]
    dtype: torch.dtype | None


@dataclass(frozen=True, slots=True)
class StageRun:
    """What a stage that runs itself is given.

    Attributes:
        plan: its own.
        model: what it begins with, as the stages before it made it.
        original: what the recipe begins with.
        data: calibration, and its tokens; no tokens where the plan needs none.
        tokens: see `data`.
        folder: where shards and checkpoints go.
        journal: what is done already.
        on_event: told of every step, then of every part that is written.
        message: told what else a user should know.
    """

    plan: Plan
    model: Model
    original: Model
    data: Data
    tokens: Tensor | None
    folder: Path
    journal: Journal
    on_event: OnEvent
    message: Callable[[str], None]


class OwnStage(ABC):
    """A stage that a layer above the engine brings: it plans itself, and runs itself.

    Attributes:
        description: the stage as the recipe spells it.
    """

    description: dict[str, Any]

    @abstractmethod
    def plan(self, before: Before) -> Plan:
        """What it will do and take.

        Raises:
            ValueError: anything that would stop it later.
        """

    @abstractmethod
    def steps(self) -> tuple[StepRules, ...]:
        """Those of a streamed pass that would leave weights of the same form; none: it leaves their form alone."""

    @abstractmethod
    def run(self, given: StageRun) -> dict[str, Any]:
        """Do it, or go on where an earlier process stopped; gives what its entry in the lineage says beside the usual.

        Raises:
            ValueError: anything the user can mend.
        """


StructureStage = DepthStage | WidthStage | ExpertStage | SliceStage
"""Stages that change which matrices there are, or their shapes."""

Stage = BlocksStage | ModelStage | CacheStage | StructureStage | OwnStage


@dataclass(frozen=True, slots=True)
class RecipePlan:
    """What a whole recipe will do and take.

    Attributes:
        stages: each stage's plan, in order; a later one counts with what the earlier ones are expected to make.
        result: the model that it is expected to make, its weights described but not there; None: that shows only in
            the run, where an earlier run's weights are compressed further.
        weights_checked: whether all weights were read, and hold numbers; a run does that before anything else.
    """

    stages: tuple[Plan, ...]
    result: Model | None
    weights_checked: bool = False

    @property
    def num_parameters(self) -> int:
        """The model's."""
        return self.stages[0].num_parameters

    @property
    def needs_data(self) -> bool:
        """Whether any stage needs calibration tokens."""
        return any(plan.needs_data for plan in self.stages)

    @property
    def peak_bytes(self) -> int:
        """Predicted peak of the process's memory, that of the most demanding stage."""
        return max(plan.peak_bytes for plan in self.stages)

    @property
    def limit_bytes(self) -> int:
        """What the budget allows."""
        return self.stages[0].limit_bytes

    @property
    def output_bytes(self) -> int:
        """Predicted size of the result."""
        return self.stages[-1].output_bytes

    @property
    def bits_per_weight(self) -> float:
        """Predicted bits of the result for each parameter, everything counted."""
        return self.stages[-1].bits_per_weight

    @property
    def disk_bytes(self) -> int:
        """Most that the run's files take at a time: every stage's result stays until the run is over."""
        return most_on_disk(self.stages)

    @property
    def seconds(self) -> float:
        """A rough estimate."""
        return sum(plan.seconds for plan in self.stages)


def completed(model: Model, stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
    """A recipe's stages; behind them the model's own key-value cache policy, if they make what it learned obsolete.

    A policy that learned from calibration, as scales, did so on the model as it was. So it learns again, unless the
    recipe has a policy itself. Doing this twice changes nothing.

    Args:
        model: what the recipe begins with.
        stages: as the recipe has them.

    Raises:
        ValueError: the model's policy is damaged.
    """
    policy = read_policy(model)
    if policy is None or not policy.method.learns or any(isinstance(stage, CacheStage) for stage in stages):
        return stages
    return (*stages, CacheStage(policy.method, {"cache": policy_settings(policy.method)}))


def plan_stages(
    model: Model,
    stages: tuple[Stage, ...],
    data: Data,
    budget: Budget,
    out: Path | None,
    *,
    fresh: bool = False,
    dtypes: Mapping[int, torch.dtype] | None = None,
    original: Model | None = None,
) -> RecipePlan:
    """Resolve all stages and predict what each takes.

    Args:
        model: what the recipe begins with.
        stages: in order; `completed` adds what belongs behind them.
        data: calibration.
        budget: limits.
        out: output folder, to look at its disk; None: not looked at.
        fresh: what lies in `out` goes first.
        dtypes: what to run a stage's blocks in, by its number; others: whatever this machine does fastest.
        original: whose predictions are imitated by stages that tune; None: `model`.

    Raises:
        ValueError: anything that would stop the run later: see `make_plan`, `plan_tuning`, `plan_cache`,
            `check_disk`; or a calibration text that is not there.
    """
    stages, original = completed(model, stages), original or model
    plans: tuple[Plan, ...] = ()
    earlier: tuple[tuple[StepRules, ...], ...] = ()
    for number, stage in enumerate(stages):
        dtype = (dtypes or {}).get(number)
        if isinstance(stage, ModelStage):
            plans += (plan_tuning(model, original, stage.method, data, budget, plans, dtype),)
        elif isinstance(stage, StructureStage):
            _check_first(stage, earlier)
            plan, model = _plan_structure(model, stage, data, budget, dtype)
            plans += (plan,)
        elif isinstance(stage, OwnStage):
            plans += (stage.plan(Before(model, original, data, budget, plans, earlier, dtype)),)
            earlier += (stage.steps(),) if stage.steps() else ()
        elif isinstance(stage, CacheStage):
            if number + 1 < len(stages):
                raise ValueError(
                    "cache must be the recipe's last stage: it is for the model as it is in the end; move it there"
                )
            plans += (plan_cache(model, stage.method, data, budget, plans, dtype),)
        else:
            plans += (make_plan(model, stage.steps, data, budget, dtype, earlier),)
            model = rotated(model, stage.steps)
            earlier += (stage.steps,)
        if plans[-1].needs_data:
            check_source(data)
    found = RecipePlan(with_notes(plans, model.nbytes), _result(model, stages[-1], plans))
    if out is not None:
        check_disk(plans, out, budget.scratch, fresh=fresh)
    return found


def reshaped(model: Model, stage: Stage) -> Reshaped | None:
    """What a stage's pass makes of the shapes of a model's blocks; None: they stay.

    Raises:
        ValueError: the model does not allow it.
    """
    if isinstance(stage, WidthStage):
        return narrowed(model, stage.method)
    if isinstance(stage, ExpertStage):
        return FewerExperts.of(model, stage.method)
    return None


def _check_first(stage: StructureStage, earlier: tuple[tuple[StepRules, ...], ...]) -> None:
    """Refuse a stage that changes shapes after those that compress matrices."""
    if earlier:
        raise ValueError(
            f"{next(iter(stage.description))} changes which matrices there are; put it before the stages that "
            "compress them"
        )


def _plan_structure(
    model: Model, stage: StructureStage, data: Data, budget: Budget, dtype: torch.dtype | None
) -> tuple[Plan, Model]:
    """The plan, and the model with the shapes that it will have."""
    if isinstance(stage, DepthStage):
        return plan_depth(model, stage.method, data, budget, dtype)
    if isinstance(stage, SliceStage):
        return plan_slicing(model, stage.method, data, budget, dtype)
    if isinstance(stage, ExpertStage):
        return plan_experts(model, stage.method, data, budget, dtype)
    return plan_width(model, stage.method, data, budget, dtype)


def _result(model: Model, last: Stage, plans: tuple[Plan, ...]) -> Model | None:
    """What comes of it; `model` is in the basis that the stages set. Only passes change what weights are."""
    passes = [plan for plan in plans if plan.steps]
    described = passes[-1].described if passes else model.described
    if described is None:
        return None
    cache = describe_policy(last.method, ()) if isinstance(last, CacheStage) else model.cache
    return replace(model, described=described, cache=cache)

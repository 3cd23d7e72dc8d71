"""What a recipe consists of, and the plan of all of it: a hopeless recipe is refused before its first stage runs."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from decoct.engine.budget import Budget
from decoct.engine.data import Data, check_source
from decoct.engine.disk import check_disk, most_on_disk
from decoct.engine.plan import Plan, StepRules, make_plan
from decoct.engine.plan_cache import plan_cache
from decoct.engine.plan_tuning import plan_tuning
from decoct.engine.rotate import rotated
from decoct.methods import CacheMethod
from decoct.methods.policy import describe_policy, policy_settings, read_policy
from decoct.methods.quantize.e2e_qp import E2EQP
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


Stage = BlocksStage | ModelStage | CacheStage


@dataclass(frozen=True, slots=True)
class RecipePlan:
    """What a whole recipe will do and take.

    Attributes:
        stages: each stage's plan, in order; a later one counts with what the earlier ones are expected to make.
        result: the model that it is expected to make, its weights described but not there; None: that shows only in
            the run, where an earlier run's weights are compressed further.
    """

    stages: tuple[Plan, ...]
    result: Model | None

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

    Raises:
        ValueError: anything that would stop the run later: see `make_plan`, `plan_tuning`, `plan_cache`,
            `check_disk`; or a calibration text that is not there.
    """
    stages = completed(model, stages)
    plans: tuple[Plan, ...] = ()
    earlier: tuple[tuple[StepRules, ...], ...] = ()
    for number, stage in enumerate(stages):
        dtype = (dtypes or {}).get(number)
        if isinstance(stage, ModelStage):
            plans += (plan_tuning(model, stage.method, data, budget, plans, dtype),)
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
    found = RecipePlan(plans, _result(model, stages[-1], plans))
    if out is not None:
        check_disk(plans, out, budget.scratch, fresh=fresh)
    return found


def _result(model: Model, last: Stage, plans: tuple[Plan, ...]) -> Model | None:
    """What comes of it; `model` is in the basis that the stages set. Only passes change what weights are."""
    passes = [plan for plan in plans if plan.kind == "blocks"]
    described = passes[-1].described if passes else model.described
    if described is None:
        return None
    cache = describe_policy(last.method, ()) if isinstance(last, CacheStage) else model.cache
    return replace(model, described=described, cache=cache)

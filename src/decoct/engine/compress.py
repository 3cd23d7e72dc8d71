"""A recipe's stages, one after another, each resumable; at the end a checkpoint that is whole or is not there."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from decoct.engine.admission import (
    calibration_tokens,
    check_output,
    check_source_tensors,
    data_record,
    discard,
    is_result_of,
    short_digest,
    undamaged,
)
from decoct.engine.allocate import Allocating, allocated, allocates
from decoct.engine.budget import planning_as_at, resident_bytes
from decoct.engine.cache import CachePass, run_cache, written_policy
from decoct.engine.disk import DONE_FOLDER, RUN_FOLDER, result_folder, scratch_folder, stage_folder
from decoct.engine.find_channels import Thinning, thinned
from decoct.engine.find_guidance import Finding, find_guidance
from decoct.engine.find_information import Informing, find_information
from decoct.engine.find_masks import Masking, find_masks
from decoct.engine.guidance import Guidance, layout
from decoct.engine.job import Job, Watch
from decoct.engine.journal import JOURNAL, Journal, begun_otherwise, exclusive, recorded_dtype
from decoct.engine.learn_basis import Learning, learned_basis
from decoct.engine.narrow import NarrowModel, trunks
from decoct.engine.plan import Plan
from decoct.engine.plan_depth import candidates_at_once
from decoct.engine.reshaped import Reshaped
from decoct.engine.rotate import RotatedModel, rotated
from decoct.engine.run_depth import DepthPass, describe_depth, run_depth
from decoct.engine.sliced import Slicing, run_slicing
from decoct.engine.stages import (
    CacheStage,
    DepthStage,
    ModelStage,
    OwnStage,
    RecipePlan,
    SliceStage,
    Stage,
    StageRun,
    StructureStage,
    WidthStage,
    completed,
    plan_stages,
    reshaped,
)
from decoct.engine.stream import Event, OnEvent, Pass, run_pass
from decoct.engine.summary import Result, read_result, write_summary
from decoct.engine.tune import CHECKPOINT, Tuning, run_tuning
from decoct.engine.uneven import Sizing, UnevenModel, sized
from decoct.engine.write import finish_folder
from decoct.methods.prune.sheared_llama import ShearedLLaMA
from decoct.methods.rotate.spinquant import SpinQuant
from decoct.model import Model, open_model
from decoct.version import __version__


def compress_job(job: Job, watch: Watch) -> Result:
    """Run a job, or go on with it where an earlier process stopped.

    Raises:
        ValueError: anything the user can mend; one line that says what to do.
    """
    given, job = job.stages, replace(job, stages=completed(job.model, job.stages))
    run, done = job.out / RUN_FOLDER, job.out / DONE_FOLDER
    if not job.fresh and is_result_of(job.out, job):
        shutil.rmtree(done, ignore_errors=True)  # what a process that was stopped at the very end left behind
        found = undamaged(job.out)
        watch.message(f"{job.out} holds the finished result of this command; add --fresh to do it again")
        return found
    check_output(job, run)
    loaded, plan = resident_bytes(), _plan(job)
    if len(job.stages) > len(given):
        (name,) = job.stages[-1].description["cache"]
        watch.message(f"{name} learns again at the end: what was saved with the model is of the weights as they were")
    if plan.result is not None:
        job.accept(plan.result)
    with exclusive(run):
        check_source_tensors(job.model)
        tokens = calibration_tokens(job, run, watch) if plan.needs_data else None
        if job.fresh:  # not before what may be refused
            discard(job.out, run)
        model, plans, events = job.model, list(plan.stages), list[list[Event]]()
        for number, stage in enumerate(job.stages):
            planned = plans[number]
            watch.planned(planned, number + 1, len(job.stages))
            events.append([])
            model = rotated(model, planned.steps)
            entry, model = _run_stage(job, number, planned, model, tokens, watch, events[-1])
            staged, folder = stage_folder(job.out, number), result_folder(job.out, number, len(job.stages))
            cache = written_policy(staged) if isinstance(stage, CacheStage) else model.cache
            finish_folder(model, staged, folder, _shards(staged), entry, cache)
            model = open_model(folder)
            if isinstance(stage, StructureStage):  # only now it shows which matrices there are
                with planning_as_at(loaded):
                    plans[number + 1 :] = _plan_rest(job, number + 1, model)
        write_summary(job.out, [planned.kind for planned in plans], events, job.started)
    run.replace(done)  # at once: a run folder that is half removed would look like an unfinished run
    shutil.rmtree(done)
    return read_result(job.out)


def _run_stage(
    job: Job,
    number: int,
    plan: Plan,
    model: Model,
    tokens: Int[Tensor, "sequences length"] | None,
    watch: Watch,
    events: list[Event],
) -> tuple[dict[str, Any], Model]:
    """Run one stage on what the one before it made, `model`.

    Returns:
        Its entry in the lineage, and the model whose config and other files belong to the result.
    """
    stage, staged = job.stages[number], stage_folder(job.out, number)
    tokens = tokens if plan.needs_data else None
    entry: dict[str, Any] = {
        "decoct": __version__,
        "source": {"label": Path(job.model.source.label).name, "fingerprint": short_digest(model.source.fingerprint())},
        "stage": stage.description,
        "data": None if tokens is None else data_record(job.data, tokens),
        "compute_dtype": str(plan.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }

    def note(event: Event) -> None:
        events.append(event)
        watch.event(event)

    if isinstance(stage, ModelStage | OwnStage) and begun_otherwise(staged, entry, ("stage", "data")):
        watch.message(f"{plan.kind} starts again with the new settings; the stages before it are kept")
        (staged / CHECKPOINT).unlink(missing_ok=True)  # first of all: without a journal it would seem to fit any run
        shutil.rmtree(staged)
    scratch = scratch_folder(job.out, number, job.budget.scratch)
    if scratch != staged and not (staged / JOURNAL).exists():
        shutil.rmtree(scratch, ignore_errors=True)  # of a run that was discarded: nothing in it is this one's
    journal = Journal(staged, entry, result_folder(job.out, number, len(job.stages)))
    if isinstance(stage, ModelStage):
        assert tokens is not None
        run_tuning(Tuning(stage.method, model, job.model, tokens, plan.dtype, staged, journal, note))
        return entry, model
    if isinstance(stage, OwnStage):
        given = StageRun(plan, model, job.model, job.data, tokens, staged, journal, note, watch.message)
        return {**entry, **stage.run(given)}, model
    if isinstance(stage, DepthStage):
        assert tokens is not None
        how = stage.method, model, tokens, plan.dtype, candidates_at_once(plan, model, stage.method, job.data)
        left = run_depth(DepthPass(*how, plan.in_memory, staged, scratch, journal, note, watch.message))
        _clear(scratch, staged)
        return {**entry, **describe_depth(left, stage.method)}, left
    if isinstance(stage, SliceStage):
        assert tokens is not None
        return entry, run_slicing(Slicing(stage.method, model, tokens, plan.dtype, staged, journal, note))
    if isinstance(stage, CacheStage):
        run_cache(CachePass(stage.method, model, tokens, plan.dtype, staged, scratch, journal, note))
        _clear(scratch, staged)
        return entry, model
    model, tokens = _thinned(plan, stage, model, tokens, staged, note)
    becomes = reshaped(model, stage)
    return entry, _run_blocks(plan, model, tokens, staged, scratch, journal, note, becomes)


def _thinned(
    plan: Plan, stage: Stage, model: Model, tokens: Tensor | None, staged: Path, note: OnEvent
) -> tuple[Model, Tensor | None]:
    """The model without the hidden channels that a stage takes out, and the tokens that the rest of the stage needs."""
    if not isinstance(stage, WidthStage) or stage.method.keep_hidden == 1:
        return model, tokens
    assert tokens is not None
    left = thinned(Thinning(model, stage.method, tokens, plan.dtype, staged, note))
    return left, tokens if trunks(left, stage.method) else None


def _run_blocks(
    plan: Plan,
    model: Model,
    tokens: Int[Tensor, "sequences length"] | None,
    staged: Path,
    scratch: Path,
    journal: Journal,
    note: OnEvent,
    becomes: Reshaped | None,
) -> Model:
    """Stream the blocks; gives the model in the basis and with the shapes in which it is written."""
    if isinstance(model, RotatedModel) and isinstance(model.method, SpinQuant):
        assert tokens is not None
        model = replace(model, basis=learned_basis(Learning(model.method, model, tokens, plan.dtype, staged, note)))
    scratch.mkdir(parents=True, exist_ok=True)
    becomes = _informed(plan, becomes, tokens, (staged, scratch), note)
    steps = plan.steps
    if allocates(steps):
        assert tokens is not None
        steps = allocated(steps, Allocating(model, tokens, plan.dtype, staged, note))
    todo = Pass(
        model=model,
        steps=steps,
        tokens=tokens,
        dtype=plan.dtype,
        in_memory=plan.in_memory,
        folder=staged,
        scratch=scratch,
        journal=journal,
        on_event=note,
        guidance=_guidance(plan, model, tokens, scratch, note),
        becomes=becomes,
    )
    run_pass(todo)
    _clear(scratch, staged)
    return becomes or model


def _informed(
    plan: Plan, becomes: Reshaped | None, tokens: Tensor | None, places: tuple[Path, Path], note: OnEvent
) -> Reshaped | None:
    """The same, with what gradients or learned masks say of neurons and heads, and with each block's width.

    `places`: for what is found, and for what lies on disk on the way.
    """
    if isinstance(becomes, NarrowModel) and becomes.method.by_gradient:
        assert tokens is not None
        if isinstance(becomes.method, ShearedLLaMA):
            found = find_masks(Masking(becomes, tokens, plan.dtype, places[0], note))
        else:
            edges = trunks(becomes.base, becomes.method)
            found = find_information(Informing(becomes.base, edges, tokens, plan.dtype, *places, note))
        becomes = replace(becomes, information={becomes.prefix(block): each for block, each in enumerate(found)})
    return sized(Sizing(becomes, tokens, plan.dtype, places[0], note)) if isinstance(becomes, UnevenModel) else becomes


def _clear(scratch: Path, staged: Path) -> None:
    """Remove what a stage kept on the way."""
    for path in scratch.glob("*.bin"):
        path.unlink()
    if scratch != staged and scratch.exists():
        shutil.rmtree(scratch)


def _guidance(plan: Plan, model: Model, tokens: Tensor | None, scratch: Path, note: OnEvent) -> Guidance | None:
    """Token weights for what a stage guides; None if it guides nothing."""
    found = layout(model, plan.steps)
    if found is None:
        return None
    assert tokens is not None
    return find_guidance(Finding(model, found, tokens, plan.dtype, scratch, note))


def _plan(job: Job) -> RecipePlan:
    """Plan all stages."""
    dtypes = {} if job.fresh else _begun_in(job, 0)
    return plan_stages(job.model, job.stages, job.data, job.budget, job.out, fresh=job.fresh, dtypes=dtypes)


def _plan_rest(job: Job, first: int, model: Model) -> tuple[Plan, ...]:
    """Plan the stages from `first` on, which begin with `model`."""
    if first == len(job.stages):
        return ()
    stages, dtypes = job.stages[first:], _begun_in(job, first)
    return plan_stages(model, stages, job.data, job.budget, None, dtypes=dtypes, original=job.model).stages


def _begun_in(job: Job, first: int) -> dict[int, torch.dtype]:
    """What stages from `first` on compute in if they have begun: measuring again might choose otherwise."""
    found = {}
    for number in range(first, len(job.stages)):
        dtype = recorded_dtype(stage_folder(job.out, number) / JOURNAL)
        found.update({} if dtype is None else {number - first: dtype})
    return found


def _shards(staged: Path) -> dict[str, str]:
    lines = (staged / JOURNAL).read_text(encoding="utf-8").splitlines()[1:]
    entries = [json.loads(line) for line in lines]
    return dict(sorted((entry["shard"], entry["sha256"]) for entry in entries))

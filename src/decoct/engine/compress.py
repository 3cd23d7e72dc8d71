"""A recipe's stages, one after another, each resumable; at the end a checkpoint that is whole or is not there."""

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from decoct.engine.budget import Budget, peak_resident_bytes
from decoct.engine.data import Data, load_tokens, tokens_digest
from decoct.engine.journal import JOURNAL, Journal, exclusive, recorded_dtype
from decoct.engine.plan import Plan, StepRules, check_stages, make_plan
from decoct.engine.stream import Event, OnEvent, Pass, run_pass
from decoct.engine.tune import Tuning, plan_tuning, run_tuning
from decoct.engine.write import finish_folder
from decoct.methods.quantize.e2e_qp import E2EQP
from decoct.model import Model, open_model
from decoct.store import MANIFEST, RUN_SUMMARY, FolderSource, open_safetensors, read_json, save_safetensors, write_json
from decoct.version import __version__

RUN_FOLDER = ".run"
"""Inside the output folder while a run is unfinished: journal, shards, activations."""

DONE_FOLDER = ".run-done"
"""What the run folder is called while it is being removed."""


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


Stage = BlocksStage | ModelStage


@dataclass(frozen=True, slots=True)
class Job:
    """Everything that `compress_job` needs.

    Attributes:
        model: what to compress.
        stages: in order.
        data: calibration.
        budget: limits.
        out: output folder.
        fresh: discard what an unfinished run, or an earlier result of decoct, left there.
    """

    model: Model
    stages: tuple[Stage, ...]
    data: Data
    budget: Budget
    out: Path
    fresh: bool = False


@dataclass(frozen=True, slots=True)
class Watch:
    """Where progress goes.

    Attributes:
        message: told one line at a time.
        planned: told each stage's plan before it runs.
        event: told of every finished part.
    """

    message: Callable[[str], None] = field(default=lambda _: None)
    planned: Callable[[Plan], None] = field(default=lambda _: None)
    event: OnEvent = field(default=lambda _: None)


@dataclass(frozen=True, slots=True)
class Result:
    """What a run made.

    Attributes:
        folder: the checkpoint.
        nbytes: bytes of its tensors.
        bits_per_weight: everything counted.
        seconds: of this process; a resumed run counts from the resumption.
        peak_bytes: most memory that the process held.
        errors: relative squared error of each part that was compressed, by part, of the last stage.
        starved: slots that no calibration token reached; they were compressed without data.
    """

    folder: Path
    nbytes: int
    bits_per_weight: float
    seconds: float
    peak_bytes: int
    errors: dict[str, float]
    starved: tuple[str, ...]


def compress_job(job: Job, watch: Watch) -> Result:
    """Run a job, or go on with it where an earlier process stopped.

    Raises:
        ValueError: anything the user can mend; one line that says what to do.
    """
    started = time.perf_counter()
    run, done = job.out / RUN_FOLDER, job.out / DONE_FOLDER
    if done.exists() and not job.fresh and is_result_of(job.out, job):
        shutil.rmtree(done)  # all that was left to do
        return read_result(job.out)
    _check_output(job, run)
    plan = _plan(job, 0, job.model, run)
    if len(job.stages) > 1:
        check_stages(job.model, [stage.steps for stage in job.stages if isinstance(stage, BlocksStage)])
    with exclusive(run):
        if job.fresh:
            _discard(job.out, run)
        _check_source(job.model, thorough=plan.needs_data)
        events: list[Event] = []
        model = job.model
        tokens: Tensor | None = None
        for number, stage in enumerate(job.stages):
            last = number == len(job.stages) - 1
            if number > 0:
                plan = _plan(job, number, model, run)
            watch.planned(plan)
            if plan.needs_data and tokens is None:
                tokens = _tokens(job, run, watch)
            staged = run / f"stage-{number}"
            folder = job.out if last else run / f"result-{number}"
            events.clear()
            used = tokens if plan.needs_data else None
            entry = _run_stage(job, stage, plan, model, used, (staged, folder), watch, events)
            finish_folder(model, staged, folder, _shards(staged), entry)
            model = open_model(folder)
        _write_summary(job, events, started)
    run.replace(done)  # at once: a run folder that is half removed would look like an unfinished run
    shutil.rmtree(done)
    return Result(
        folder=job.out,
        nbytes=model.nbytes,
        bits_per_weight=model.bits_per_weight,
        seconds=time.perf_counter() - started,
        peak_bytes=peak_resident_bytes(),
        errors={event.part: event.error for event in events if event.error is not None},
        starved=tuple(name for event in events for name in event.starved),
    )


def _run_stage(
    job: Job,
    stage: Stage,
    plan: Plan,
    model: Model,
    tokens: Int[Tensor, "sequences length"] | None,
    places: tuple[Path, Path],
    watch: Watch,
    events: list[Event],
) -> dict[str, Any]:
    """Stream one stage into the first of `places` (the second: where it will go); gives its entry in the lineage."""
    staged, folder = places
    entry: dict[str, Any] = {
        "decoct": __version__,
        "source": {"label": Path(model.source.label).name, "fingerprint": _short(model.source.fingerprint())},
        "stage": stage.description,
        "data": None if tokens is None else _data_record(job.data, tokens),
        "compute_dtype": str(plan.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }

    def note(event: Event) -> None:
        events.append(event)
        watch.event(event)

    journal = Journal(staged, entry, folder)
    if isinstance(stage, ModelStage):
        assert tokens is not None
        run_tuning(Tuning(stage.method, model, job.model, tokens, plan.dtype, staged, journal, note))
        return entry
    scratch = staged if job.budget.scratch is None else job.budget.scratch / _short(str(job.out.absolute()))
    scratch.mkdir(parents=True, exist_ok=True)
    todo = Pass(
        model=model,
        steps=plan.steps,
        tokens=tokens,
        dtype=plan.dtype,
        in_memory=plan.in_memory,
        folder=staged,
        scratch=scratch,
        journal=journal,
        on_event=note,
    )
    run_pass(todo)
    if scratch != staged:
        shutil.rmtree(scratch)
    return entry


def _data_record(data: Data, tokens: Tensor) -> dict[str, Any]:
    """Calibration as the lineage tells it; a file by its name alone, so that a moved one is still the same."""
    return {**data.model_dump(), "source": _text_name(data), "tokens": tokens_digest(tokens)}


def _text_name(data: Data) -> str:
    return Path(data.source).name if Path(data.source).exists() else data.source


def _plan(job: Job, number: int, model: Model, run: Path) -> Plan:
    """Plan a stage. A resumed one computes in what it began with: measuring again might choose otherwise."""
    journal = run / f"stage-{number}" / JOURNAL
    dtype = None if job.fresh else recorded_dtype(journal)
    return plan_stage(model, job.stages[number], job.data, job.budget, job.out, dtype)


def plan_stage(
    model: Model, stage: Stage, data: Data, budget: Budget, out: Path | None, dtype: torch.dtype | None = None
) -> Plan:
    """What a stage will do and take; see `make_plan` and `plan_tuning`.

    Raises:
        ValueError: anything that would stop it later.
    """
    if isinstance(stage, ModelStage):
        return plan_tuning(model, stage.method, data, budget, out, dtype)
    return make_plan(model, stage.steps, data, budget, out, dtype)


def _tokens(job: Job, run: Path, watch: Watch) -> Tensor:
    """Calibration tokens, saved with the run so that a resumed one has the same."""
    path = run / "tokens.safetensors"
    key = _short(json.dumps(job.data.model_dump(), sort_keys=True) + job.model.source.fingerprint())
    if path.exists():
        saved = open_safetensors(path)
        if saved.metadata.get("key") == key:
            return saved.read("tokens")
    tokens = load_tokens(job.data, job.model, watch.message)
    save_safetensors(path, {"tokens": tokens}, {"key": key})
    return tokens


def _check_output(job: Job, run: Path) -> None:
    """Refuse to write over anything that is not ours to finish."""
    out = job.out
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; choose a folder for the result")
    source = job.model.source
    if isinstance(source, FolderSource) and source.folder.resolve().is_relative_to(out.resolve()):
        verb = "is" if out.samefile(source.folder) else "holds"
        raise ValueError(f"{out} {verb} the model itself; choose another folder for the result")
    finished, unfinished = (out / MANIFEST).exists(), _has_journal(run)
    if job.fresh and (finished or run.exists()):
        return
    if finished and not unfinished:
        raise ValueError(f"{out} already holds a finished model; choose another folder, or add --fresh to replace it")
    if out.exists() and not run.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty and holds no run of decoct; choose another folder")


def _discard(out: Path, run: Path) -> None:
    """Remove an unfinished run (but the lock, which is held) and, where decoct wrote it, the result beside it."""
    ours = [path for path in run.iterdir() if path.name != "lock"]
    if (out / MANIFEST).exists():
        ours += [path for path in out.iterdir() if path != run]
    for path in ours:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _has_journal(run: Path) -> bool:
    """Whether a run folder holds work, and not a mere lock."""
    return any(run.glob(f"stage-*/{JOURNAL}"))


def _check_source(model: Model, *, thorough: bool) -> None:
    """Find damage before hours are spent: checksums where there are any, NaN before a long run."""
    if isinstance(model.source, FolderSource):
        model.source.verify()
    if not thorough:
        return
    for name in model.source.names():
        tensor = model.source.read(name)
        if tensor.is_floating_point() and not torch.isfinite(tensor.sum(dtype=torch.float32)):
            raise ValueError(f"{model.source.label}: {name} holds NaN or infinite values; the checkpoint is damaged")


def _shards(staged: Path) -> dict[str, str]:
    lines = (staged / JOURNAL).read_text(encoding="utf-8").splitlines()[1:]
    entries = [json.loads(line) for line in lines]
    return dict(sorted((entry["shard"], entry["sha256"]) for entry in entries))


def _write_summary(job: Job, events: list[Event], started: float) -> None:
    """Times and memory, apart from the checkpoint's own files: those are the same bits however often it was resumed."""
    lines = [
        {
            "part": e.part,
            "error": e.error,
            "seconds": round(e.seconds, 3),
            "nbytes": e.nbytes,
            "starved": list(e.starved),
        }
        for e in events
    ]
    summary = {"seconds": round(time.perf_counter() - started, 1), "peak_bytes": peak_resident_bytes(), "parts": lines}
    write_json(job.out / "decoct-run.json", summary)


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_summary(folder: Path) -> dict[str, Any]:
    """decoct-run.json of a finished checkpoint: seconds, peak memory, each part's error."""
    return dict(read_json(folder / RUN_SUMMARY))


def is_result_of(folder: Path, job: Job) -> bool:
    """Whether a folder holds the finished result of a job: the same stages on the same model with the same data."""
    if not (folder / MANIFEST).exists() or _has_journal(folder / RUN_FOLDER):
        return False
    made = read_json(folder / MANIFEST)["lineage"][-len(job.stages) :]
    if [entry["stage"] for entry in made] != json.loads(json.dumps([stage.description for stage in job.stages])):
        return False
    data = {**job.data.model_dump(), "source": _text_name(job.data)}
    read = [{k: v for k, v in entry["data"].items() if k != "tokens"} for entry in made if entry["data"]]
    same_model = made[0]["source"]["fingerprint"] == _short(job.model.source.fingerprint())
    return same_model and all(each == data for each in read)


def read_result(folder: Path) -> Result:
    """The result of a run that is over.

    Raises:
        ValueError: the folder is no finished result.
    """
    summary, model = read_summary(folder), open_model(folder)
    return Result(
        folder=folder,
        nbytes=model.nbytes,
        bits_per_weight=model.bits_per_weight,
        seconds=summary["seconds"],
        peak_bytes=summary["peak_bytes"],
        errors={part["part"]: part["error"] for part in summary["parts"] if part["error"] is not None},
        starved=tuple(name for part in summary["parts"] for name in part["starved"]),
    )

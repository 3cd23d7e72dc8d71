"""The Python API: the commands' names, on paths or opened models."""

import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from decoct.engine.admission import check_source_tensors, is_result_of
from decoct.engine.budget import planning_as_at, resident_bytes
from decoct.engine.compress import compress_job
from decoct.engine.data import check_text
from decoct.engine.job import Job, Watch
from decoct.engine.stages import RecipePlan, plan_stages
from decoct.engine.summary import Result
from decoct.evaluation import Measurement, evaluate_model
from decoct.evaluation.measure import OnProgress
from decoct.exporters import ExportReport, check_expected, check_format, export_model, is_finished, place
from decoct.exporters.imatrix import importance_from
from decoct.methods import METHODS
from decoct.methods.policy import read_policy
from decoct.model import Model, open_model
from decoct.recipe import Recipe, RecipeError, parse_recipe, read_recipe, recipe_text, with_rules, with_settings
from decoct.search import Found, SearchPlan, find_bits
from decoct.search import plan_search as plan_bits
from decoct.store import FolderSource, atomic_path
from decoct.training.processes import num_processes, process_number
from decoct.training.together import compress_together

_CHECKED_BYTES = 4 * 10**9
"""A plan reads weights that take no more than this, to see whether they are damaged: some seconds."""

RecipeLike = str | Path | dict[str, Any] | Sequence[str | Path | dict[str, Any]]
"""A preset's name, a recipe file, a recipe as data, or several of these to run one after another."""


@dataclass(frozen=True, slots=True)
class RoleSummary:
    """Slots of one role."""

    role: str
    kind: str
    count: int
    shape: tuple[int, int]
    parameters: int


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a checkpoint is.

    Attributes:
        num_parameters: before any compression.
        nbytes: of all tensors now.
        bits_per_weight: everything counted.
        roles: its matrices by role, kind of weight and shape.
        lineage: what decoct did to it before.
        cache: the policy for keys and values that was saved with it, with its settings, by name; None: none.
    """

    model: str
    family: str
    num_blocks: int
    dtype: str
    tied: bool
    num_parameters: int
    nbytes: int
    bits_per_weight: float
    roles: tuple[RoleSummary, ...]
    lineage: tuple[dict[str, Any], ...]
    cache: dict[str, Any] | None


@dataclass(frozen=True, slots=True)
class MethodInfo:
    """A method as `decoct methods` lists it."""

    name: str
    about: str
    settings: dict[str, Any]


def inspect(model: str | Path | Model) -> Inspection:
    """Describe a checkpoint without loading its weights.

    Raises:
        ValueError: see `open_model`.
    """
    opened = open_model(model)
    counts: Counter[tuple[str, str, tuple[int, int]]] = Counter()
    for name, slot in opened.slots().items():
        out, cols = opened.shape(name)
        counts[slot.role, _kind(opened, name), (out, cols)] += 1
    roles = tuple(RoleSummary(r, k, n, shape, n * prod(shape)) for (r, k, shape), n in counts.items())
    return Inspection(
        model=opened.source.label,
        family=opened.family.name,
        num_blocks=opened.num_blocks,
        dtype=str(opened.dtype).removeprefix("torch."),
        tied=opened.tied,
        num_parameters=opened.num_parameters,
        nbytes=opened.nbytes,
        bits_per_weight=opened.bits_per_weight,
        roles=roles,
        lineage=opened.lineage,
        cache=None if read_policy(opened) is None else (opened.cache or {})["policy"],
    )


def load_recipe(recipe: RecipeLike, settings: Sequence[str] = ()) -> Recipe:
    """Read, adjust and check a recipe; several are joined, the first one's data and budget counting.

    Args:
        recipe: see RecipeLike.
        settings: `key=value` texts as `--set` takes them.

    Raises:
        RecipeError: anything wrong with it.
    """
    several = [recipe] if isinstance(recipe, str | Path | dict) or not isinstance(recipe, Sequence) else list(recipe)
    if not all(isinstance(each, str | Path | dict) for each in several):
        raise RecipeError(f"a recipe is a file, a preset's name, a mapping, or a list of these, not {recipe!r}")
    if isinstance(settings, str):
        raise RecipeError(f"settings are a list of texts such as ['gptq.bits=3'], not {settings!r}")
    if not several:
        raise RecipeError("give a recipe file or a preset; `decoct methods` lists presets")
    values = [each if isinstance(each, dict) else read_recipe(each) for each in several]
    for value in values:
        if not isinstance(value.get("stages", []), list):
            raise RecipeError("a recipe needs stages: a list such as [{blocks: [{linear: {gptq: {bits: 4}}}]}]")
    joined = dict(values[0])
    joined["stages"] = [stage for value in values for stage in value.get("stages") or []]
    for value in values[1:]:
        joined = {**{k: v for k, v in value.items() if k != "stages"}, **joined}
    parsed = parse_recipe(with_settings(joined, list(settings)))
    for form in parsed.export:
        _check_format(form)
    return parsed


def plan(
    model: str | Path | Model, recipe: RecipeLike, *, settings: Sequence[str] = (), out: Path | None = None
) -> RecipePlan:
    """What a recipe would do and take, stage by stage; nothing is run. What a search would change: `plan_search`.

    The weights of a folder are read, unless there are very many: `weights_checked` says so.

    Args:
        model: folder, .gguf file, hub id, or an opened model.
        recipe: see RecipeLike.
        settings: `key=value` texts as `--set` takes them, e.g. "gptq.bits=3".
        out: folder of the result, to look at its disk; None: not looked at.

    Raises:
        ValueError: anything that would stop the run later.
    """
    parsed = load_recipe(recipe, settings)
    opened = open_model(model)
    found = plan_stages(opened, parsed.stages, parsed.data, parsed.budget, out)
    _check_exports(found, parsed)
    if found.needs_data:
        check_text(parsed.data, opened)
    return _with_weights_checked(found, opened)


def plan_search(
    model: str | Path | Model, recipe: RecipeLike, *, settings: Sequence[str] = ()
) -> tuple[SearchPlan, RecipePlan] | None:
    """What a recipe's search would do and take, and the recipe as it would be with all matrices alike; None: no search.

    The second plan has the mildest level that keeps the target everywhere; the real ones are not known yet.

    Args:
        model: folder, .gguf file, hub id, or an opened model.
        recipe: see RecipeLike.
        settings: `key=value` texts as `--set` takes them, e.g. "search.bits=3.3".

    Raises:
        ValueError: anything that would stop the search or the run later.
    """
    parsed = load_recipe(recipe, settings)
    if parsed.search is None:
        return None
    opened = open_model(model)
    found = plan_bits(opened, parsed.stages, parsed.data, parsed.budget, parsed.search)
    target = found.target
    rules = target.rules(dict.fromkeys(target.names, found.alike))
    alike = with_rules(parsed, target.stage, target.step, rules)
    planned = plan_stages(opened, alike.stages, alike.data, alike.budget, None)
    _check_exports(planned, alike)
    check_text(alike.data, opened)
    return found, _with_weights_checked(planned, opened)


def compress(
    model: str | Path | Model,
    recipe: RecipeLike,
    out: str | Path,
    *,
    settings: Sequence[str] = (),
    fresh: bool = False,
    watch: Watch | None = None,
    write_recipe: str | Path | None = None,
    on_found: Callable[[Found], None] = lambda _: None,
) -> Result:
    """Run a recipe and write the result to `out`; the same call again resumes a run that was cut off.

    A recipe with `search` has its bits or sparsities chosen first, and is then run as an ordinary one.

    Args:
        model: folder, .gguf file, hub id, or an opened model.
        recipe: see RecipeLike.
        out: folder of the result.
        settings: `key=value` texts as `--set` takes them, e.g. "gptq.bits=3".
        fresh: replace what decoct left in `out` before.
        watch: where progress goes.
        write_recipe: file for the recipe that the search finds; without a search, for the recipe as it is.
        on_found: told what the search chose.

    Raises:
        ValueError: anything the user can mend, in one line.
    """
    parsed, loaded = load_recipe(recipe, settings), resident_bytes()
    folder = Path(out)
    job = Job(open_model(model), parsed.stages, parsed.data, parsed.budget, folder, fresh, _accept(parsed.export))
    about = "Written by decoct."
    if parsed.search is not None:
        # What the search cannot mend is refused before it.
        _check_exports(plan_stages(job.model, job.stages, job.data, job.budget, folder), parsed)
        target, found = find_bits(job, parsed.search, watch or Watch())
        on_found(found)
        parsed, fresh = with_rules(parsed, target.stage, target.step, target.rules(found.choice)), False
        job = replace(job, stages=parsed.stages, fresh=fresh)
        what = f"{found.bits:.3f} bits per weight" if found.sparsity is None else f"{found.sparsity:.4f} removed"
        about = f"{found.setting.capitalize()} chosen by decoct: {what} of the matrices searched."
    if write_recipe is not None:
        with atomic_path(Path(write_recipe)) as partial:
            partial.write_text(recipe_text(parsed, about), encoding="utf-8")
    missing = list(parsed.export)
    if not fresh and is_result_of(folder, job):
        missing = [form for form in missing if not is_finished(place(folder, form))]
    with planning_as_at(loaded):
        together = compress_together if num_processes() > 1 else compress_job
        result = together(job, watch or Watch())
    for form in [] if process_number() else missing:
        (watch or Watch()).message(_export_result(folder, form))
    return result


def evaluate(
    model: str | Path | Model,
    *,
    text: str | Path,
    against: str | Path | Model | None = None,
    windows: int | None = None,
    length: int | None = None,
    bos: bool = False,
    dtype: torch.dtype = torch.float32,
    keep_base: str | Path | None = None,
    on_progress: OnProgress = lambda _done, _total: None,
) -> Measurement:
    """Perplexity, and divergence from a base model, on the same tokens.

    Args:
        model: what to measure.
        text: a text file or hub dataset.
        against: the base model; None: perplexity alone.
        windows: non-overlapping windows from the text's start; None: all.
        length: tokens in a window; None: 2048 or the model's limit.
        bos: start each window with BOS.
        dtype: what to compute in.
        keep_base: a folder in which what the base made of the text is kept: the next measurement against it is
            shorter by almost half. A few megabytes for each window.
        on_progress: told (blocks done, blocks in all).

    Raises:
        ValueError: see `evaluate_model`.
    """
    return evaluate_model(
        open_model(model),
        text=str(text),
        against=None if against is None else open_model(against),
        windows=windows,
        length=length,
        bos=bos,
        dtype=dtype,
        keep_base=None if keep_base is None else Path(keep_base),
        on_progress=on_progress,
    )


def export(
    model: str | Path | Model,
    to: str,
    out: str | Path,
    *,
    fold: bool = False,
    load: bool = True,
    tensor_parallel: int | None = None,
    imatrix: str | Path | None = None,
) -> ExportReport:
    """Write a model in another engine's format, and see whether that engine reads it as decoct does.

    Args:
        model: folder, .gguf file, hub id, or an opened model.
        to: a format, perhaps with a variant: "compressed_tensors", "gguf:q4_k_m".
        out: its folder, or file.
        fold: write as dense, or round again, what the format cannot hold.
        load: try the result in the engine that it is for, where that is installed.
        tensor_parallel: devices among which vLLM is to divide it; refused if it could not.
        imatrix: an importance matrix, for GGUF's types that are fitted.

    Returns:
        What was checked; `ok` is False where something differs.

    Raises:
        ValueError: see `export_model`.
    """
    _check_format(to)
    opened = open_model(model)
    importance = None if imatrix is None else importance_from(Path(imatrix), opened, to)
    return export_model(
        opened, to, Path(out), fold=fold, load=load, tensor_parallel=tensor_parallel, importance=importance
    )


def list_methods() -> tuple[MethodInfo, ...]:
    """Every method with its settings and defaults."""
    import sys

    found = []
    for name, cls in METHODS.items():
        about = (sys.modules[cls.__module__].__doc__ or "").strip().splitlines()[0]
        settings = {f.name: None if f.default is MISSING else f.default for f in fields(cls)}
        found.append(MethodInfo(name, about, settings))
    return tuple(found)


def _export_result(folder: Path, form: str) -> str:
    """A recipe's export, beside its result; gives a line about it."""
    out = place(folder, form)
    if out.is_dir():
        shutil.rmtree(out)
    out.unlink(missing_ok=True)
    see = f"leave `export` out of the recipe, and see `decoct export {folder} --to {form} --help`"
    try:
        report = export_model(open_model(folder), form, out)
    except ValueError as error:
        raise ValueError(f"{folder} is finished, but not its export: {error}; {see}") from error
    if not report.ok:
        raise ValueError(f"{folder} is finished, but its export {out.name} differs: {report.failed}; {see}")
    return report.line


def _accept(export: Sequence[str]) -> Callable[[Model], None]:
    """Refuses an expected result that one of these formats cannot hold."""

    def check(result: Model) -> None:
        for form in export:
            check_expected(result, form)

    return check


def _with_weights_checked(found: RecipePlan, model: Model) -> RecipePlan:
    """Refuse damaged weights, where reading them all takes seconds."""
    if not isinstance(model.source, FolderSource) or model.nbytes > _CHECKED_BYTES:
        return found
    check_source_tensors(model)
    return replace(found, weights_checked=True)


def _check_exports(found: RecipePlan, recipe: Recipe) -> None:
    if found.result is not None:
        _accept(recipe.export)(found.result)


def _check_format(to: str) -> None:
    try:
        check_format(to)
    except ValueError as error:
        raise RecipeError(str(error)) from None


def _kind(model: Model, name: str) -> str:
    def spell(description: dict[str, Any]) -> str:
        kind = str(description["kind"])
        if "bits" in description:
            kind = f"{kind} {description['bits']} bit"
        if kind == "FloatBlock":
            kind = f"{kind} {description['element']}"
        inner = [spell(value) for value in description.values() if isinstance(value, dict) and "kind" in value]
        inner += [spell(item) for item in description.get("terms", ())]
        return f"{kind}({', '.join(inner)})" if inner else kind

    return spell(model.described[name]) if name in model.described else "Dense"

"""The commands. Thin: they read arguments, call the API of the same name, and print."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from decoct.commands.ask import ask
from decoct.commands.bench import bench
from decoct.commands.chat import chat
from decoct.commands.common import JsonOption, ModelArgument, answer, errors
from decoct.commands.generate import generate
from decoct.commands.imatrix import imatrix
from decoct.commands.serve import serve
from decoct.console import Console, fail
from decoct.version import __version__

if TYPE_CHECKING:
    from decoct.engine.plan import Plan
    from decoct.engine.stages import RecipePlan
    from decoct.search import SearchPlan

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Boil a language model down until it fits. Start with: decoct compress MODEL --preset w4 -o OUT",
)

RecipeArgument = Annotated[str | None, typer.Argument(metavar="[RECIPE]", help="A recipe file (YAML).")]
PresetOption = Annotated[
    list[str] | None, typer.Option("--preset", help="A recipe that comes with decoct; repeat to run several in order.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, e.g. gptq.bits=3 (repeatable)."),
]
TextOption = Annotated[
    str | None, typer.Option("--data", metavar="TEXT", help="Calibration: a text file, a hub dataset, or self.")
]
BitsOption = Annotated[
    str | None,
    typer.Option(
        "--bits",
        metavar="NUMBER",
        help="Choose each matrix's bits so that they average this, scales counted, e.g. 3.3.",
    ),
]
SizeOption = Annotated[
    str | None,
    typer.Option(
        "--size",
        metavar="SIZE",
        help="Choose each matrix's bits (or sparsity) so that the result takes this, e.g. 60MiB.",
    ),
]
SparsityOption = Annotated[
    str | None,
    typer.Option(
        "--sparsity",
        metavar="FRACTION",
        help="Choose each matrix's sparsity so that this fraction of all goes, e.g. 0.6.",
    ),
]
MinutesOption = Annotated[
    float | None, typer.Option("--minutes", help="Time for stages that train, e.g. 30; they end about then.")
]
MemoryOption = Annotated[str | None, typer.Option("--memory", metavar="SIZE", help="Memory limit, e.g. 3GiB.")]


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads to use.")] = None,
) -> None:
    if version:
        sys.stdout.write(f"decoct {__version__}\n")
        raise typer.Exit
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


@app.command()
def inspect(model: ModelArgument, json: JsonOption = False) -> None:
    """Show what a model is made of, and what of it can be compressed."""
    import decoct

    with errors(json=json):
        found = decoct.inspect(model)
        answer(json=json, value=asdict(found), show=lambda console: console.inspection(found))


@app.command()
def plan(
    model: ModelArgument,
    recipe: RecipeArgument = None,
    preset: PresetOption = None,
    settings: SetOption = None,
    bits: BitsOption = None,
    size: SizeOption = None,
    sparsity: SparsityOption = None,
    data: TextOption = None,
    memory: MemoryOption = None,
    minutes: MinutesOption = None,
    json: JsonOption = False,
) -> None:
    """Say what a recipe will do and take (memory, disk, time), and stop."""
    import decoct

    with errors(json=json):
        changes = _target(bits, size, sparsity)
        chosen, changes = _recipe(
            recipe,
            preset,
            [*(settings or []), *changes, *([f"minutes={minutes}"] if minutes is not None else [])],
            data,
            memory,
            bare=_BARE[sparsity is not None] if changes else None,
        )
        searching = decoct.plan_search(model, chosen, settings=changes)
        found = decoct.plan(model, chosen, settings=changes) if searching is None else searching[1]
        value = _plan_json(found) | ({} if searching is None else {"search": _search_json(searching[0])})

        def show(console: Console) -> None:
            if searching is not None:
                console.search_plan(searching[0])
            console.plan(found)

        answer(json=json, value=value, show=show)


@app.command()
def compress(
    model: ModelArgument,
    recipe: RecipeArgument = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Folder for the result (required).")] = None,
    preset: PresetOption = None,
    settings: SetOption = None,
    bits: BitsOption = None,
    size: SizeOption = None,
    sparsity: SparsityOption = None,
    write_recipe: Annotated[
        Path | None, typer.Option("--write-recipe", metavar="FILE", help="Write the recipe that was found, as YAML.")
    ] = None,
    data: TextOption = None,
    memory: MemoryOption = None,
    minutes: MinutesOption = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Empty OUT first, if decoct wrote it.")] = False,
    json: JsonOption = False,
) -> None:
    """Compress a model. Interrupted at any point, the same command goes on where it was."""
    import decoct

    with errors(json=json, resumable=True):
        if out is None:
            raise typer.BadParameter("say where the result goes: -o OUT", param_hint="-o / --out")
        changes = _target(bits, size, sparsity)
        chosen, changes = _recipe(
            recipe,
            preset,
            [*(settings or []), *changes, *([f"minutes={minutes}"] if minutes is not None else [])],
            data,
            memory,
            bare=_BARE[sparsity is not None] if changes else None,
        )
        console = Console.for_stderr()
        with console.progress() as watch:
            result = decoct.compress(
                model, chosen, out, settings=changes, fresh=fresh, watch=watch,
                write_recipe=write_recipe, on_found=console.found,
            )  # fmt: skip
        answer(json=json, value=asdict(result), show=lambda console: console.result(result))


@app.command()
def evaluate(
    model: ModelArgument,
    text: Annotated[str, typer.Option("--text", help="A text file or hub dataset to measure on.")],
    against: Annotated[str | None, typer.Option("--against", metavar="BASE", help="The uncompressed model.")] = None,
    windows: Annotated[
        int | None, typer.Option("--windows", min=1, help="Windows from the text's start (all).")
    ] = None,
    length: Annotated[
        int | None, typer.Option("--length", min=2, help="Tokens in a window (2048 or the limit).")
    ] = None,
    bos: Annotated[bool, typer.Option("--bos", help="Start each window with the BOS token.")] = False,
    dtype: Annotated[str, typer.Option("--dtype", help="float32, or bfloat16 (faster, blurs small KL).")] = "float32",
    keep_base: Annotated[
        Path | None, typer.Option("--keep-base", metavar="FOLDER", help="Run the base once: keep what it made here.")
    ] = None,
    record: Annotated[
        Path | None, typer.Option("--record", help="Append the measurement to this JSON-lines file.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Measure perplexity and, against a base, KL divergence and top-1 agreement on the same text."""
    import torch

    import decoct
    from decoct.evaluation import append_measurement

    with errors(json=json):
        if dtype not in ("float32", "bfloat16"):
            raise typer.BadParameter("must be float32 or bfloat16", param_hint="--dtype")
        with Console.for_stderr().counter("block") as on_progress:
            found = decoct.evaluate(
                model, text=text, against=against, windows=windows, length=length, bos=bos,
                dtype=getattr(torch, dtype), keep_base=keep_base, on_progress=on_progress,
            )  # fmt: skip
        if record is not None:
            append_measurement(record, found)
        answer(json=json, value=asdict(found), show=lambda console: console.measurement(found))


@app.command()
def export(
    model: ModelArgument,
    to: Annotated[
        str,
        typer.Option("--to", help="gguf, gguf:q4_k_m, compressed_tensors, gptq, awq, mlx, onnx, openvino, dense."),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder or file for the export.")],
    fold: Annotated[
        bool, typer.Option("--fold", help="Write uncompressed, or round again, what the format cannot hold.")
    ] = False,
    load: Annotated[
        bool, typer.Option(help="Try the export in the engine that it is for, if that is installed.")
    ] = True,
    tensor_parallel: Annotated[
        int | None, typer.Option(help="Refuse what vLLM could not divide among so many devices.")
    ] = None,
    imatrix: Annotated[
        Path | None, typer.Option(help="An importance matrix, for GGUF's fitted types; see decoct imatrix.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Write a compressed model in another engine's format, and check that the engine reads it as decoct does."""
    import decoct

    with errors(json=json):
        found = decoct.export(model, to, out, fold=fold, load=load, tensor_parallel=tensor_parallel, imatrix=imatrix)
        answer(json=json, value=found.as_json(), show=lambda console: console.export_report(found))
        if not found.ok:
            fail(f"{out} was written, but differs: {found.failed}", 1, json=False)


@app.command()
def methods(json: JsonOption = False) -> None:
    """List methods, their settings and defaults, and the presets."""
    from decoct.api import list_methods
    from decoct.recipe import presets

    with errors(json=json):
        found, recipes = list_methods(), presets()
        value = {"methods": [asdict(method) for method in found], "presets": recipes}
        answer(json=json, value=value, show=lambda console: console.methods(found, recipes))


for _command in (generate, chat, bench, serve, ask, imatrix):
    app.command()(_command)

_BARE = {False: "w4", True: "sparse50"}  # what a search for bits (or sparsities) takes where no recipe is given


def main() -> None:
    """Entry point of the `decoct` command."""
    app()


def _target(bits: str | None, size: str | None, sparsity: str | None) -> list[str]:
    """Settings for a search; what is given here replaces the recipe's own target."""
    targets = {"bits": bits, "size": size, "sparsity": sparsity}
    given = [key for key, value in targets.items() if value is not None]
    if len(given) > 1:
        raise typer.BadParameter(f"give one of --{' and --'.join(given)}", param_hint="--bits / --size / --sparsity")
    if not given:
        return []
    from pydantic import ValidationError

    from decoct.recipe import RecipeError
    from decoct.search.settings import Search

    (key,) = given
    try:
        found = Search.model_validate({key: targets[key]}).model_dump()
    except ValidationError as error:
        raise RecipeError(f"--{key}: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None
    return [f"search.{each}={'null' if each != key else found[key]}" for each in targets]


def _recipe(
    recipe: str | None,
    preset: list[str] | None,
    settings: list[str] | None,
    data: str | None,
    memory: str | None,
    *,
    bare: str | None,
) -> tuple[list[str | Path], list[str]]:
    chosen: list[str | Path] = [Path(recipe)] if recipe else []
    if recipe and Path(recipe).suffix not in (".yaml", ".yml"):
        raise typer.BadParameter(
            f"{recipe} is no .yaml file; presets are given as --preset {recipe}", param_hint="RECIPE"
        )
    chosen += preset or []
    if bare is not None and not chosen:
        chosen = [bare]
    if not chosen:
        raise typer.BadParameter("give a recipe file, or a preset such as --preset w4", param_hint="RECIPE")
    changes = list(settings or [])
    changes += [f"data.source={data}"] if data else []
    changes += [f"budget.host={memory}"] if memory else []
    return chosen, changes


def _plan_json(found: "RecipePlan") -> dict[str, object]:
    return {
        "num_parameters": found.num_parameters,
        "needs_data": found.needs_data,
        "peak_bytes": found.peak_bytes,
        "limit_bytes": found.limit_bytes,
        "output_bytes": found.output_bytes,
        "disk_bytes": found.disk_bytes,
        "seconds": found.seconds,
        "bits_per_weight": found.bits_per_weight,
        "weights_checked": found.weights_checked,
        "stages": [_stage_json(stage) for stage in found.stages],
    }


def _search_json(found: "SearchPlan") -> dict[str, object]:
    target = found.target
    return {
        "groups": len(target.ties),
        "matrices": len(target.names),
        "parameters": target.entries,
        "setting": target.setting,
        "levels": list(target.levels),
        "wanted_bits": found.wanted_bits,
        "wanted_sparsity": found.wanted_sparsity,
        "least_bits": found.least_bits,
        "most_bits": found.most_bits,
        "peak_bytes": found.peak_bytes,
        "disk_bytes": found.disk_bytes,
        "seconds": found.seconds,
    }


def _stage_json(found: "Plan") -> dict[str, object]:
    from decoct.recipe import method_settings

    groups = [
        {
            "role": g.role,
            "count": g.count,
            "parameters": g.parameters,
            "methods": [method_settings(m) for m in g.methods],
        }
        for g in found.groups
    ]
    return {
        "stage": found.kind,
        "needs_data": found.needs_data,
        "in_memory": found.in_memory,
        "peak_bytes": found.peak_bytes,
        "output_bytes": found.output_bytes,
        "scratch_bytes": found.scratch_bytes,
        "checkpoint_bytes": found.checkpoint_bytes,
        "seconds": found.seconds,
        "bits_per_weight": found.bits_per_weight,
        "notes": list(found.notes),
        "groups": groups,
    }


if __name__ == "__main__":
    main()

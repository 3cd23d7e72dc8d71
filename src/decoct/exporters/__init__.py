"""Checkpoints for other engines, by format name."""

from difflib import get_close_matches
from pathlib import Path

from torch import Tensor

from decoct.exporters.formats import EXPORTERS, Exporter, Request
from decoct.exporters.misfit import MisfitError
from decoct.exporters.report import Check, ExportReport, report_path, size_of
from decoct.exporters.vllm_rules import Stored, check_for_vllm, check_tensor_parallel
from decoct.model import Model
from decoct.store import read_json

FORMATS: tuple[str, ...] = tuple(EXPORTERS)


def export_model(
    model: Model,
    to: str,
    out: Path,
    *,
    fold: bool = False,
    load: bool = True,
    importance: dict[str, Tensor] | None = None,
    tensor_parallel: int | None = None,
) -> ExportReport:
    """Write a model in another engine's format, and see whether that engine reads it as we do.

    Args:
        model: what to write.
        to: one of FORMATS, perhaps with a colon and a variant, such as "gguf:q4_k_m".
        out: a folder that does not exist yet, or is empty; a file that does not exist yet for `gguf`.
        fold: write as dense what the format cannot express, round again what a type cannot hold, instead of refusing.
        load: try the result in the engine that it is for, where that is installed.
        importance: of each input feature, by slot, for types that are fitted; None: all alike.
        tensor_parallel: devices among which vLLM is to divide it; refused if it could not.

    Returns:
        The report, also saved beside the export. Where something differs, `ok` is False and nothing is removed.

    Raises:
        ValueError: an unknown format, a weight that it cannot hold, or something in the way at `out`.
    """
    exporter, variant = find_exporter(to)
    request = Request(model, variant, out, fold, load, importance or {})
    exporter.check(model, variant, fold)
    stored = None if exporter.stored is None else exporter.stored(model, fold)
    _check_devices(to, model, stored, tensor_parallel)
    _refuse_occupied(exporter, out)
    notes = exporter.write(request)
    checks, text = exporter.verify(request)
    if stored is not None:
        written = read_json(out / "config.json")["quantization_config"]
        checks += check_for_vllm(model, to.partition(":")[0], stored, written)
    report = ExportReport(to, out, size_of(out), notes, tuple(checks), text)
    report.save()
    return report


def check_expected(model: Model, to: str) -> None:
    """Refuse, while planning, a recipe's export that the recipe's result would not fit.

    Args:
        model: what the recipe is expected to make; only its descriptions are looked at.
        to: see `export_model`.

    Raises:
        ValueError: the format cannot hold it; names the first matrix and what the format takes instead.
    """
    exporter, variant = find_exporter(to)
    try:
        exporter.check(model, variant, False)
    except MisfitError as error:
        raise ValueError(
            f"export {to}: {error.what}; {error.wanted}, or take {to} out of the recipe's export "
            "(decoct export --help tells what --fold does)"
        ) from error


def check_format(to: str) -> None:
    """Refuse a format that there is not.

    Raises:
        ValueError: its name is unknown; the nearest is named.
    """
    find_exporter(to)


def find_exporter(to: str) -> tuple[Exporter, str | None]:
    """A format's exporter, and the variant that stands after a colon.

    Raises:
        ValueError: either is unknown; the nearest is named.
    """
    name, _, variant = to.partition(":")
    exporter = EXPORTERS.get(name)
    if exporter is None:
        raise ValueError(f"unknown export format {to!r}{_nearest(name, FORMATS)}")
    if not variant and ":" not in to:
        return exporter, None
    if variant not in exporter.variants:
        if not exporter.variants:
            raise ValueError(f"{name} has no variants; leave :{variant} out")
        close = _nearest(variant, exporter.variants, f"{name}:")
        raise ValueError(f"unknown variant {variant!r} of {name}{close}")
    return exporter, variant


def place(folder: Path, to: str) -> Path:
    """Where a recipe's export in a format lies within the result."""
    exporter, _ = find_exporter(to)
    return folder / f"{to.replace(':', '-')}{exporter.suffix}"


def is_finished(path: Path) -> bool:
    """Whether an export at a place was written and looked at to the end."""
    return report_path(path).exists()


def _check_devices(to: str, model: Model, stored: list[Stored] | None, devices: int | None) -> None:
    if devices is None:
        return
    if stored is None:
        raise ValueError(f"vLLM divides compressed_tensors, gptq and awq, not {to}; leave tensor-parallel out")
    if devices < 1:
        raise ValueError(f"tensor-parallel must be 1 or more, not {devices}")
    check_tensor_parallel(model, stored, devices)


def _nearest(name: str, known: tuple[str, ...], before: str = "") -> str:
    close = get_close_matches(name, known, n=1, cutoff=0.4)
    return f"; did you mean {before}{close[0]}?" if close else f"; known: {', '.join(before + each for each in known)}"


def _refuse_occupied(exporter: Exporter, out: Path) -> None:
    if exporter.suffix and out.is_dir():
        raise ValueError(f"{out} is a folder; name a file such as {out / 'model'}{exporter.suffix}")
    if exporter.suffix and out.exists():
        raise ValueError(f"{out} is there already; choose another name for the export")
    if not exporter.suffix and out.exists() and (out.is_file() or any(out.iterdir())):
        raise ValueError(f"{out} is not empty; choose another folder for the export")


__all__ = [
    "FORMATS", "Check", "ExportReport", "MisfitError", "check_expected", "check_format", "export_model",
    "find_exporter", "is_finished", "place", "report_path",
]  # fmt: skip

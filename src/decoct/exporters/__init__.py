"""Checkpoints for other engines, by format name."""

from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path

from decoct.exporters.compressed_tensors import export_compressed_tensors, find_schemes
from decoct.exporters.dense import check_dense, export_dense
from decoct.exporters.misfit import MisfitError
from decoct.model import Model

FORMATS: tuple[str, ...] = ("compressed_tensors", "dense")


def export_model(model: Model, to: str, out: Path, *, fold: bool = False) -> None:
    """Write a model in another engine's format.

    Args:
        model: what to write.
        to: one of FORMATS.
        out: a folder that does not exist yet, or is empty.
        fold: write as dense what the format cannot express, instead of refusing.

    Raises:
        ValueError: an unknown format, a weight that it cannot hold, or a folder that is not empty.
    """
    check_format(to)
    writers: dict[str, Callable[[], None]] = {
        "compressed_tensors": lambda: export_compressed_tensors(model, out, fold=fold),
        "dense": lambda: export_dense(model, out, fold=fold),
    }
    writers[to]()


def check_expected(model: Model, to: str) -> None:
    """Refuse, while planning, a recipe's export that the recipe's result would not fit.

    Args:
        model: what the recipe is expected to make; only its descriptions are looked at.
        to: one of FORMATS.

    Raises:
        ValueError: the format cannot hold it; names the first matrix and what the format takes instead.
    """
    checks: dict[str, Callable[[], object]] = {
        "compressed_tensors": lambda: find_schemes(model, fold=False),
        "dense": lambda: check_dense(model, fold=False),
    }
    try:
        checks[to]()
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
    if to not in FORMATS:
        close = get_close_matches(to, FORMATS, n=1, cutoff=0.4)
        hint = f"; did you mean {close[0]}?" if close else f"; known: {', '.join(FORMATS)}"
        raise ValueError(f"unknown export format {to!r}{hint}")


__all__ = ["FORMATS", "MisfitError", "check_expected", "check_format", "export_model"]

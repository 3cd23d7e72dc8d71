"""Checkpoints for other engines, by format name."""

from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path

from decoct.exporters.compressed_tensors import export_compressed_tensors
from decoct.exporters.dense import export_dense
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


def check_format(to: str) -> None:
    """Refuse a format that there is not.

    Raises:
        ValueError: its name is unknown; the nearest is named.
    """
    if to not in FORMATS:
        close = get_close_matches(to, FORMATS, n=1, cutoff=0.4)
        hint = f"; did you mean {close[0]}?" if close else f"; known: {', '.join(FORMATS)}"
        raise ValueError(f"unknown export format {to!r}{hint}")


__all__ = ["FORMATS", "check_format", "export_model"]

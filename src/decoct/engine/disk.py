"""Where an unfinished run's files lie, and whether the disk has room for what it will write."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from decoct.engine.budget import format_size
from decoct.engine.plan import Plan
from decoct.engine.tune import CHECKPOINT
from decoct.store import MANIFEST, free_bytes

RUN_FOLDER = ".run"
"""Inside the output folder while a run is unfinished: tokens, and the two folders of each stage."""

DONE_FOLDER = ".run-done"
"""What the run folder is called while it is being removed."""


def stage_folder(out: Path, number: int) -> Path:
    """Where a stage works, counted from 0: journal, shards, activations, checkpoints."""
    return out / RUN_FOLDER / f"stage-{number}"


def result_folder(out: Path, number: int, total: int) -> Path:
    """Where a stage's finished result lies: the last one's in the output folder itself."""
    return out if number == total - 1 else out / RUN_FOLDER / f"result-{number}"


def scratch_folder(out: Path, number: int, scratch: Path | None) -> Path:
    """Where a stage's activations lie: beside its shards, or in a folder of this run inside `scratch`."""
    if scratch is None:
        return stage_folder(out, number)
    return scratch / hashlib.sha256(str(out.absolute()).encode()).hexdigest()[:16]


def check_disk(plans: Sequence[Plan], out: Path, scratch: Path | None, *, fresh: bool) -> None:
    """Refuse what the disk cannot hold: every stage's result stays until the run is over.

    Args:
        plans: the stages', in order.
        out: output folder; what an unfinished run has written there, and will not write again, need not be free.
        scratch: folder for activations; None: inside `out`.
        fresh: everything in `out` goes before the run begins.

    Raises:
        ValueError: a place has too little room; says how much is missing where.
    """
    gone = _size((out if (out / MANIFEST).exists() else out / RUN_FOLDER).rglob("*")) if fresh else 0
    apart = scratch is not None and _device(scratch) != _device(out)
    kept, most_here, most_there = 0, 0, 0
    for number, plan in enumerate(plans):
        staged, folder = stage_folder(out, number), result_folder(out, number, len(plans))
        if not fresh and (folder / "config.json").exists():
            continue
        kept += _lacking(plan.output_bytes, [] if fresh else [*staged.glob("model-*"), *folder.glob("model-*")])
        states = [] if fresh else scratch_folder(out, number, scratch).glob("*.bin")
        aside = _lacking(plan.scratch_bytes, states)
        most_there = max(most_there, aside)
        checkpoints = _lacking(plan.checkpoint_bytes, [] if fresh else staged.glob(CHECKPOINT))
        most_here = max(most_here, kept + checkpoints + (0 if apart else aside))
        kept += plan.checkpoint_bytes // 2  # the last one stays
    places = [(out, most_here - gone)]
    places += [(scratch, most_there)] if scratch is not None and apart else []
    for place, needed in places:
        free = free_bytes(place)
        if needed > free:
            raise ValueError(
                f"{place} needs about {format_size(needed)} of disk, {format_size(free)} are free; "
                "free some, or choose another output folder or budget.scratch"
            )


def most_on_disk(plans: Iterable[Plan]) -> int:
    """Bytes that a run's files take at most, scratch included."""
    kept, most = 0, 0
    for plan in plans:
        kept += plan.output_bytes
        most = max(most, kept + plan.scratch_bytes + plan.checkpoint_bytes)
        kept += plan.checkpoint_bytes // 2
    return most


def _lacking(needed: int, written: Iterable[Path]) -> int:
    """Bytes still to be written where some files are there already."""
    return max(0, needed - _size(written))


def _size(paths: Iterable[Path]) -> int:
    return sum(path.stat().st_size for path in paths if path.is_file())


def _device(path: Path) -> int:
    while not path.exists():
        path = path.absolute().parent
    return path.stat().st_dev

"""What a run has finished, line by line on disk: killed anywhere, the same command goes on where it was."""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from decoct.store import sha256

JOURNAL = "journal.jsonl"
"""The journal's name in a stage's folder."""

LOCK = "lock"
"""The lock's name in a run's folder."""


class Journal:
    """An append-only list of finished parts; the first line says which run they belong to."""

    def __init__(self, folder: Path, identity: dict[str, Any], result: Path) -> None:
        """Open or start the journal of a run.

        Args:
            folder: where it lies, and where shards are written.
            result: where finished shards are moved in the end.
            identity: everything that determines the result (recipe, source, tokens, …).

        Raises:
            ValueError: the folder holds an unfinished run with another identity.
        """
        identity = _as_read_back(identity)
        self._path = folder / JOURNAL
        self._places = (folder, result)
        self.parts: dict[str, dict[str, Any]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        lines = _whole_lines(self._path)
        if not lines:
            self._path.unlink(missing_ok=True)
            self._append({"identity": identity})
            return
        before = lines[0].get("identity", {})
        changed = sorted(key for key in {*before, *identity} if not same_json(before.get(key), identity.get(key)))
        if changed:
            raise ValueError(
                f"{folder.parent.parent} holds an unfinished run with another {', '.join(changed)}; repeat the first "
                "command to finish it, add --fresh to discard it, or choose another output folder"
            )
        for line in lines[1:]:
            self.parts[line["part"]] = line
        self._rewrite(lines)

    def finished(self, part: str) -> dict[str, Any] | None:
        """A finished part's line, its shard checked against the checksum; None if it must be done (again)."""
        line = self.parts.get(part)
        if line is None:
            return None
        shards = (place / line["shard"] for place in self._places)
        whole = any(shard.exists() and sha256(shard) == line["sha256"] for shard in shards)
        return line if whole else None

    def finish(self, part: str, shard: Path, **details: Any) -> None:
        """Note that a part's shard is safely on disk."""
        line = {"part": part, "shard": shard.name, "sha256": sha256(shard), **details}
        self.parts[part] = line
        self._append(line)

    def _append(self, line: dict[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(line) + "\n")
            handle.flush()
            os.fsync(handle.fileno())

    def _rewrite(self, lines: list[dict[str, Any]]) -> None:
        """Drop a last line that a crash cut short."""
        text = "".join(json.dumps(line) + "\n" for line in lines)
        if self._path.read_text(encoding="utf-8") != text:
            partial = self._path.with_suffix(".partial")
            partial.write_text(text, encoding="utf-8")
            partial.replace(self._path)


def recorded_dtype(path: Path) -> torch.dtype | None:
    """What the run that keeps this journal computes in; None if there is no such run."""
    lines = _whole_lines(path)
    name = lines[0]["identity"].get("compute_dtype") if lines else None
    return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}.get(str(name))


def begun_otherwise(folder: Path, identity: dict[str, Any], keys: Iterable[str]) -> bool:
    """Whether a stage's folder holds a run that differs in one of these keys and has not finished any part."""
    lines, identity = _whole_lines(folder / JOURNAL), _as_read_back(identity)
    before = lines[0].get("identity", {}) if len(lines) == 1 else identity
    return any(not same_json(before.get(key), identity.get(key)) for key in keys)


def same_json(one: object, other: object) -> bool:
    """Whether two values are the same as JSON has them: true is not 1, which Python takes to be equal."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Keep other processes out of a run's folder; the lock goes with the process, however it ends.

    A folder in which nothing was kept goes too, so that what was refused leaves no trace.

    Raises:
        ValueError: another process is at work there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"another decoct process is writing to {folder.parent}; wait for it or stop it") from None
    try:
        yield
    finally:
        if folder.exists() and {path.name for path in folder.iterdir()} <= {LOCK}:
            (folder / LOCK).unlink(missing_ok=True)
            folder.rmdir()
            with suppress(OSError):  # it holds something else
                folder.parent.rmdir()
        lock.release()


def _as_read_back(value: dict[str, Any]) -> dict[str, Any]:
    """What JSON makes of it: tuples become lists."""
    return dict(json.loads(json.dumps(value)))


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break  # cut short by a crash: what follows was never written
    return lines

"""What was checked of an export, and what came of it; printed, and saved beside the export."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from decoct.store import write_json

REPORT = "decoct-export.json"
"""The report's name in an exported folder; beside a file it is the file's name and `.report.json`."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: what.
        ok: None: it was not checked, `detail` says why.
        detail: figures, or what differs.
        warning: it is no fault of the export, but the engine may refuse it or be slow.
    """

    name: str
    ok: bool | None
    detail: str
    warning: bool = False


@dataclass(frozen=True, slots=True)
class ExportReport:
    """An export.

    Attributes:
        format: as it was asked for, e.g. "gguf:q4_0".
        path: file or folder.
        nbytes: of all its files.
        notes: what a user should know of how it was written.
        checks: see `Check`.
        text: what the other engine wrote when asked to go on with a sentence; None: it was not run.
    """

    format: str
    path: Path
    nbytes: int
    notes: tuple[str, ...]
    checks: tuple[Check, ...]
    text: str | None

    @property
    def ok(self) -> bool:
        """Whether nothing that was checked differs."""
        return all(check.ok is not False for check in self.checks)

    @property
    def failed(self) -> str:
        """What differs, in one line."""
        return "; ".join(f"{check.name}: {check.detail}" for check in self.checks if check.ok is False)

    @property
    def line(self) -> str:
        """What was written, and how much of it was checked, in one line."""
        passed = sum(check.ok is True for check in self.checks)
        where = report_path(self.path)
        return f"exported {self.path} ({self.format}): {passed} of {len(self.checks)} checks passed; see {where}"

    def as_json(self) -> dict[str, Any]:
        """For `--json` and the file."""
        return {**asdict(self), "path": str(self.path), "ok": self.ok}

    def save(self) -> None:
        """Write it beside the export."""
        write_json(report_path(self.path), self.as_json())


def report_path(path: Path) -> Path:
    """Where the report of an export at `path` lies."""
    return path / REPORT if path.is_dir() else path.with_name(f"{path.name}.report.json")


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(each.stat().st_size for each in path.rglob("*") if each.is_file())

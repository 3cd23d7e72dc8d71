"""Steps that only prepare matrices: a plan and a run say so where nothing behind them compresses."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cli.test_commands import answer, invoke

AWQ: dict[str, Any] = {"awq": {"bits": 4, "group_size": 8}}
RTN: dict[str, Any] = {"linear": {"rtn": {"bits": 4, "group_size": 8}}}
NOTES = {
    "awq": ([[AWQ]], "awq only rescales channels, and no step behind it compresses"),
    "smoothquant": ([[{"smoothquant": {}}]], "smoothquant only rescales channels"),
    "quarot": ([[{"quarot": {}}]], "quarot only rotates"),
    "a rule that leaves all": ([[AWQ, {"linear": {"match": "*", "leave": True}}]], "awq only rescales"),
    "a quantizer behind it": ([[AWQ, RTN]], ""),
    "a stage behind it": ([[AWQ], [RTN]], ""),
    "a smaller step": ([[AWQ, {"linear": {"match": "0.mlp.down", "rtn": {"bits": 4, "group_size": 8}}}]], ""),
}


def recipe(folder: Path, passes: list[list[dict[str, Any]]], text: Path) -> Path:
    data = {"source": str(text), "num_sequences": 4, "sequence_length": 16}
    (folder / "mine.yaml").write_text(yaml.safe_dump({"data": data, "stages": [{"blocks": each} for each in passes]}))
    return folder / "mine.yaml"


@pytest.mark.parametrize("what", NOTES)
def test_a_plan_says_what_makes_nothing_smaller(what: str, base: Path, tmp_path: Path) -> None:
    passes, said = NOTES[what]
    made = recipe(tmp_path, passes, base.parent / "text.txt")
    shown = invoke("plan", base, made).stdout
    assert shown.count("warning: ") == (1 if said else 0)
    assert f"warning: {said}" in shown or not said
    notes = [note for stage in answer("plan", base, made)["stages"] for note in stage["notes"]]
    assert [note[: len(said)] for note in notes] == ([said] if said else [])


def test_a_run_says_it_too(base: Path, tmp_path: Path) -> None:
    made = recipe(tmp_path, [[AWQ]], base.parent / "text.txt")
    assert "warning: awq only rescales" in invoke("compress", base, made, "-o", tmp_path / "out").stderr

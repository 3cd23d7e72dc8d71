"""Runs that end at any system call whatever go on, and give the same bits."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.engine.running import AUTOROUND, EORA, EVERYTHING, GPTQ, WANDA

RECIPES: dict[str, dict[str, Any]] = {
    "one stage": {"stages": [{"blocks": [EVERYTHING]}]},
    "two stages": {"stages": [{"blocks": [WANDA]}, {"blocks": [GPTQ, EORA]}]},
    "two chains of states": {"stages": [{"blocks": [GPTQ, AUTOROUND]}]},
    "guided": {"stages": [{"blocks": [{"linear": {"gptq": {"bits": 4, "group_size": 8, "guided": 2}}}]}]},
    "a cache policy": {"stages": [{"cache": {"kivi": {"group_size": 8}}}]},
    "rotated": {"stages": [{"blocks": [{"quarot": {}}, GPTQ]}]},
    "learned rotations": {"stages": [{"blocks": [{"spinquant": {"num_steps": 3, "batch_size": 2}}, GPTQ]}]},
    "a bridge": {"stages": [{"angular": {"num_dropped": 1, "bridge": 2}}]},
    "tuned": {"stages": [{"blocks": [EVERYTHING]}, {"e2e_qp": {"num_steps": 3}}]},
}


def cut(base: Path, folder: Path, recipe: dict[str, Any], every: int) -> int:
    command = [sys.executable, "-W", "error::ResourceWarning", "-m", "tests.engine.crash_points"]
    arguments = [str(base), str(base.parent / "text.txt"), str(folder), str(every), json.dumps(recipe)]
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [*command, *arguments], cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return int(done.stdout.split()[-1])


@pytest.mark.parametrize(
    ("recipe", "every"),
    [
        ("one stage", 7),
        ("guided", 11),
        ("two chains of states", 7),
        ("a cache policy", 5),
        ("a bridge", 11),
        ("tuned", 13),
        ("learned rotations", 7),
    ],
)
def test_some_points(recipe: str, every: int, base: Path, tmp_path: Path) -> None:
    assert cut(base, tmp_path, RECIPES[recipe], every=every) >= 8


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("recipe", "every"),
    [
        ("one stage", 1),
        ("two stages", 1),
        ("two chains of states", 3),
        ("a bridge", 2),
        ("tuned", 5),
        ("rotated", 2),
        ("guided", 2),
        ("learned rotations", 3),
    ],
)
def test_every_kind_of_point(recipe: str, every: int, base: Path, tmp_path: Path) -> None:
    assert cut(base, tmp_path, RECIPES[recipe], every=every) >= 15

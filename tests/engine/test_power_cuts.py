"""Runs that end at any system call whatever go on, and give the same bits."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.engine.running import EVERYTHING

ONE_STAGE: dict[str, Any] = {"stages": [{"blocks": [EVERYTHING]}]}


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


def test_some_points(base: Path, tmp_path: Path) -> None:
    assert cut(base, tmp_path, ONE_STAGE, every=7) >= 8

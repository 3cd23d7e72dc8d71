"""Several processes train as one with as many times the accumulation; and what they refuse."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import decoct
from decoct.model import Model, open_model
from tests.engine.running import RTN, Settings, make_base

RUN = """
import sys, json, warnings
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1)
import decoct
result = decoct.compress(sys.argv[1], json.loads(sys.argv[3]), sys.argv[2])
print("losses", json.dumps(result.losses))
"""
SHORT: Settings = {"num_steps": 3, "batch_size": 2, "sequence_length": 16, "learning_rate": 0.01, "clip": 0.5}


def recipe(base: Path, *blocks: Settings, **settings: Any) -> dict[str, Any]:
    data = {"source": str(base.parent / "text.txt"), "num_sequences": 4, "sequence_length": 16}
    stages = [{"blocks": list(blocks)}] if blocks else []
    return {"data": data, "stages": [*stages, {"distill": {**SHORT, "loss": "cross_entropy", **settings}}]}


def launched(base: Path, out: Path, given: dict[str, Any], folder: Path) -> "subprocess.CompletedProcess[str]":
    """The same in two processes."""
    (folder / "run.py").write_text(RUN)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command += [str(folder / "run.py"), str(base), str(out), json.dumps(given)]
    on_cpu = {**os.environ, "ACCELERATE_USE_CPU": "1"}
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=240, env=on_cpu)


def numbers(model: Model) -> dict[str, torch.Tensor]:
    names = [*model.slots(), *(name for block in (*range(model.num_blocks), None) for name in model.others(block))]
    return {name: model.tensor(name) for name in names}


@pytest.mark.e2e
def test_two_processes_are_one_with_twice_the_accumulation(tmp_path: Path) -> None:
    base = make_base(tmp_path)
    done = launched(base, tmp_path / "two", recipe(base, evaluate_every=1, held_out=2), tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    one = decoct.compress(base, recipe(base, evaluate_every=1, held_out=2, accumulate=2), tmp_path / "one")
    both = decoct.compress(base, recipe(base, evaluate_every=1, held_out=2), tmp_path / "two")
    assert list(both.losses) == pytest.approx(list(one.losses), rel=1e-5)
    assert done.stdout.count("losses") == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "one", "run.py", "text.txt", "two"]
    expected, before = numbers(open_model(tmp_path / "one")), numbers(open_model(base))
    for name, tensor in numbers(open_model(tmp_path / "two")).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5)
    moved = [name for name in expected if not torch.equal(expected[name], before[name])]
    assert len(moved) > 20


def test_other_stages_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="several processes run a recipe of one stage that trains"):
        decoct.compress(base, recipe(base, RTN), tmp_path / "out")
    with pytest.raises(ValueError, match="replay and keep_teacher need one process"):
        decoct.plan(base, recipe(base, keep_teacher=4, loss="cached_kl"))

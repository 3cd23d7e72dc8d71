"""What stands out in a run is reported by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from decoct.console import Console
from decoct.engine.summary import outlying_blocks, read_result
from decoct.store import RUN_SUMMARY, save_safetensors
from tests.engine.running import GPTQ, RTN, make_base, run


def parts(*errors: float, nbytes: int = 1000) -> list[dict[str, Any]]:
    return [{"part": f"block {number}", "error": error, "nbytes": nbytes} for number, error in enumerate(errors)]


def test_a_block_that_stands_out_is_named() -> None:
    assert outlying_blocks(parts(0.01, 0.01, 0.2, 0.01, 0.02)) == {"block 2": pytest.approx(20)}
    assert outlying_blocks(parts(0.06, 0.01, 0.01)) == {"block 0": pytest.approx(6)}


def test_slow_growth_equal_errors_and_other_parts_are_not() -> None:
    assert outlying_blocks(parts(*(0.01 * 1.5**n for n in range(10)))) == {}
    assert outlying_blocks(parts(0.0, 0.01, 0.0)) == {}
    assert outlying_blocks(parts(0.5)) == {}
    ends = [{"part": name, "error": 9.0, "nbytes": 1000} for name in ("embedding", "lm_head")]
    assert outlying_blocks([ends[0], *parts(0.01, 0.01), ends[1]]) == {}


def test_blocks_in_other_bits_are_not_compared() -> None:
    mixed = parts(0.01, 0.01, 0.2, 0.01, 0.01)
    mixed[2]["nbytes"] = 500
    assert outlying_blocks(mixed) == {}


def test_squares_that_float32_cannot_hold_are_no_nan(tmp_path: Path) -> None:
    """A block whose outputs are huge, but finite, has an error like any other."""
    base = make_base(tmp_path)
    path = next(base.glob("*.safetensors"))
    tensors = load_file(path)
    name = next(key for key in tensors if "layers.1." in key and "down_proj" in key)
    tensors[name] *= 1e25
    save_safetensors(path, tensors)
    errors = run(base, tmp_path / "out", GPTQ).errors
    assert all(0 <= error < 1 for error in errors.values())
    assert errors["block 1"] > 1e-4


def test_the_run_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One large weight in each matrix of a block spoils the grid of all others."""
    base = make_base(tmp_path)
    shard = next(base.glob("*.safetensors"))
    tensors = load_file(shard)
    for name, tensor in tensors.items():
        if name.startswith("model.layers.1.") and tensor.ndim == 2:
            tensor[0, 0] = 20 * tensor.std()
    save_safetensors(shard, tensors)
    result = run(base, tmp_path / "out", {"linear": {"rtn": {"bits": 6, "group_size": "tensor"}}})
    assert list(result.outlying) == ["block 1"]
    assert torch.isfinite(torch.tensor(list(result.outlying.values()))).all()
    Console.for_stderr().result(result)
    shown = " ".join(capsys.readouterr().err.split())
    assert "warning: block 1 has an error of" in shown
    assert 'match: "1.*"' in shown


def test_every_streamed_stage_counts(tmp_path: Path) -> None:
    """A block that stood out in an earlier stage is named though a later one did no harm to it."""
    folder = run(make_base(tmp_path), tmp_path / "out", RTN).folder
    summary = json.loads((folder / RUN_SUMMARY).read_text())
    shared = {"seconds": 0.0, "starved": []}
    stages = [
        {"stage": "blocks", "steps": [], "parts": [{**part, **shared} for part in parts(*errors)]}
        for errors in ((0.01, 0.2, 0.01), (0.01, 0.01, 0.01))
    ]
    (folder / RUN_SUMMARY).write_text(json.dumps({**summary, "stages": stages}))
    assert list(read_result(folder).outlying) == ["block 1"]

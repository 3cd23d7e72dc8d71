"""The measured peak stays within the budget, with activations and everything."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.running import make_base

DECOCT = [str(Path(sys.executable).parent / "decoct"), "--threads", "2"]
SIZES = {
    "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 16_384, "max_position_embeddings": 512,
}  # fmt: skip


def decoct(*arguments: object) -> dict[str, Any]:
    done = subprocess.run(
        [*DECOCT, *(str(each) for each in arguments), "--json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(json.loads(done.stdout))


@pytest.mark.e2e
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("preset", ["w4", "w8", "sparse50"])
def test_peak_within_budget(preset: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base = make_base(tmp_path, "llama", dtype, **SIZES)
    data = ["--set", "data.num_sequences=128", "--set", "data.sequence_length=512"]
    (tmp_path / "text.txt").write_text((tmp_path / "text.txt").read_text() * 20)
    recipe = ["--preset", preset, *data, "--data", tmp_path / "text.txt"]
    roomy = decoct("plan", base, *recipe)
    assert roomy["stages"][0]["in_memory"]
    # What is resident before the run differs by some megabytes from process to process.
    limit = roomy["peak_bytes"] + (-64_000_000 if preset != "w8" else 16_000_000)
    tight = decoct("plan", base, *recipe, "--memory", limit)
    assert tight["stages"][0]["in_memory"] == (preset == "w8")
    result = decoct("compress", base, *recipe, "--memory", limit, "-o", tmp_path / "out")
    assert result["peak_bytes"] <= limit
    assert result["peak_bytes"] <= tight["peak_bytes"]
    assert result["nbytes"] == pytest.approx(tight["output_bytes"], rel=0.01)

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
    "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 8,
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
    limit = roomy["peak_bytes"] + (-32_000_000 if preset != "w8" else 16_000_000)
    tight = decoct("plan", base, *recipe, "--memory", limit)
    assert tight["stages"][0]["in_memory"] == (preset == "w8")
    result = decoct("compress", base, *recipe, "--memory", limit, "-o", tmp_path / "out")
    assert result["peak_bytes"] <= limit
    assert result["peak_bytes"] <= tight["peak_bytes"]
    assert result["nbytes"] == pytest.approx(tight["output_bytes"], rel=0.01)


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "mixtral": {**SIZES, "num_hidden_layers": 4, "num_local_experts": 8, "num_experts_per_tok": 2},
    "gpt2": {"n_embd": 512, "n_layer": 6, "n_head": 8, "n_positions": 512, "vocab_size": 16_384},
}
TUNED = """\
data: {source: TEXT, num_sequences: 4, sequence_length: 512}
stages:
  - blocks: [{linear: {rtn: {bits: 4, group_size: 64}}}]
  - e2e_qp: {num_steps: 2, batch_size: 2}
"""


@pytest.mark.e2e
@pytest.mark.parametrize("name", FAMILIES)
def test_peak_of_tuning(name: str, tmp_path: Path) -> None:
    """Neither more than was said, nor so much less that models that fit would be refused."""
    base = make_base(tmp_path, name, torch.float32, **FAMILIES[name])
    (tmp_path / "recipe.yaml").write_text(TUNED.replace("TEXT", str(tmp_path / "text.txt")))
    streamed, tuned = decoct("plan", base, tmp_path / "recipe.yaml")["stages"]
    result = decoct("compress", base, tmp_path / "recipe.yaml", "-o", tmp_path / "out")
    assert result["peak_bytes"] > streamed["peak_bytes"], "the peak is that of tuning"
    assert 0.6 * tuned["peak_bytes"] < result["peak_bytes"] <= tuned["peak_bytes"]

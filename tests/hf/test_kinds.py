"""Kinds of weights that calibrated quantizers make: transformers keeps them packed and computes what we compute."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import decoct.hf  # noqa: F401 - registers the format
from decoct.model import open_model
from tests.arch.test_families import our_logits
from tests.engine.running import Settings, make_base, run

RECIPES: dict[str, tuple[Settings, set[str]]] = {
    "squeezellm": ({"bits": 3, "outliers": 0.01}, {"Sum", "Codebook", "Sparse"}),
    "spqr": ({"bits": 3, "group_size": 8, "outlier_threshold": 0.01}, {"Sum", "TwoLevelInt", "Sparse"}),
    "owq": ({"bits": 4, "group_size": 8, "keep": 0.05}, {"Sum", "GroupInt", "Columns"}),
    "aqlm": ({"code_bits": 3, "vector": 4}, {"Additive"}),
}


@pytest.mark.parametrize("method", RECIPES)
@torch.no_grad()
def test_it_loads_packed(method: str, tmp_path: Path) -> None:
    settings, kinds = RECIPES[method]
    base = make_base(tmp_path)
    out = run(base, tmp_path / "out", {"linear": {method: settings}}).folder
    model = open_model(out)
    weights = [model.weight(name) for name in model.described]
    assert len(weights) == 3 * 7
    assert {node.kind for weight in weights for node in weight.walk()} == kinds
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    tokens = torch.randint(3, 60, (2, 24), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(loaded(tokens).logits, our_logits(model, tokens), rtol=1e-4, atol=1e-5)
    held = sum(t.nbytes for t in (*loaded.buffers(), *loaded.parameters()))
    assert held < 0.6 * open_model(base).nbytes

"""transformers loads decoct's checkpoints, keeps them packed, and gives the logits that our own pass gives."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import decoct.hf  # noqa: F401 - registers the format
from decoct.engine.budget import Budget
from decoct.engine.compress import compress_job
from decoct.engine.data import Data
from decoct.engine.job import Job, Watch
from decoct.model import open_model
from decoct.recipe import parse_recipe
from tests.arch.test_families import our_logits
from tests.tiny import CONFIGS, save_model

QUANTIZE = [{"linear": [{"match": ["embed", "lm_head", "*"], "rtn": {"bits": 4, "group_size": 8}}]}]


def compress(source: Path, out: Path, blocks: list[Any]) -> None:
    recipe = parse_recipe({"stages": [{"blocks": blocks}]})
    compress_job(Job(open_model(source), recipe.stages, Data(), Budget(), out), Watch())


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_every_family_loads_packed(name: str, tmp_path: Path) -> None:
    save_model(name, tmp_path / "base")
    compress(tmp_path / "base", tmp_path / "out", QUANTIZE)
    model = open_model(tmp_path / "out")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True, dtype=torch.float32)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokens = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(loaded(tokens).logits, our_logits(model, tokens), rtol=1e-4, atol=1e-5)
    held = sum(t.nbytes for t in (*loaded.buffers(), *loaded.parameters()))
    assert held < 0.5 * open_model(tmp_path / "base").nbytes


EVERYWHERE = [
    {"rtn": {"bits": 4, "group_size": 8}},
    {"hqq": {"bits": 4, "group_size": 8}},
    {"hqq": {"bits": 3, "group_size": 16, "zero": "integer"}},
    {"mxfp": {"format": "fp8"}},
    {"mxfp": {"format": "mxfp4"}},
    {"mxfp": {"format": "nvfp4"}},
]


@pytest.mark.parametrize("tied", ["llama", "llama-tied"])
@pytest.mark.parametrize("method", EVERYWHERE, ids=str)
@torch.no_grad()
def test_methods_without_data_compress_embeddings_too(method: dict[str, Any], tied: str, tmp_path: Path) -> None:
    save_model(tied, tmp_path / "base", intermediate_size=64)
    heads = ["embed"] if tied == "llama-tied" else ["embed", "lm_head"]
    compress(tmp_path / "base", tmp_path / "out", [{"linear": [{"match": [*heads, "*"], **method}]}])
    model = open_model(tmp_path / "out")
    assert model.described.keys() == model.slots().keys()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    tokens = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(loaded(tokens).logits, our_logits(model, tokens), rtol=1e-4, atol=1e-5)

"""Embedding and lm_head are compressed like any matrix, tied or not: reloaded, packed, they give the same logits."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import decoct.hf  # noqa: F401 - registers the format
from decoct.model import Model, open_model
from tests.arch.test_families import our_logits
from tests.engine.running import Settings, make_base, run

WITHOUT_DATA: dict[str, Settings] = {
    "rtn": {"bits": 4, "group_size": 8},
    "hqq": {"bits": 4, "group_size": 8},
    "mxfp": {"format": "mxfp4"},
}
WITH_DATA: dict[str, Settings] = {
    "gptq": {"bits": 4, "group_size": 8},
    "qtip": {"bits": 2, "state_bits": 4},
}


def linear(*rules: dict[str, Any]) -> Settings:
    return {"linear": list(rules)}


@torch.no_grad()
def check_reloaded(model: Model, folder: Path) -> None:
    """transformers loads the result packed, and its logits are those of the unpacked matrices."""
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokens = torch.randint(3, 60, (2, 24), generator=torch.Generator().manual_seed(1))
    logits = loaded(tokens).logits
    torch.testing.assert_close(logits, our_logits(model, tokens), rtol=1e-4, atol=1e-5)
    assert float((logits - our_logits(open_model(folder.parent / "base"), tokens)).abs().max()) > 1e-3
    held = sum(t.nbytes for t in (*loaded.buffers(), *loaded.parameters()))
    assert held < 1.1 * model.nbytes, "something is unpacked, or there twice"


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
@pytest.mark.parametrize("method", WITHOUT_DATA)
def test_without_data(method: str, name: str, tmp_path: Path) -> None:
    base = make_base(tmp_path, name, num_hidden_layers=1)
    rule = {"match": ["embed", "lm_head"], method: WITHOUT_DATA[method]}
    model = open_model(run(base, tmp_path / "out", linear(rule)).folder)
    ends = {"model.embed_tokens.weight"} | ({"lm_head.weight"} if name == "llama" else set())
    assert model.described.keys() == ends
    assert model.tied == (name == "llama-tied")
    check_reloaded(model, tmp_path / "out")


@pytest.mark.parametrize("method", WITH_DATA)
def test_lm_head_with_data(method: str, tmp_path: Path) -> None:
    """lm_head has inputs to learn from, the embedding beside it another method."""
    base = make_base(tmp_path, num_hidden_layers=1)
    rules = {"match": "lm_head", method: WITH_DATA[method]}, {"match": "embed", "rtn": WITHOUT_DATA["rtn"]}
    model = open_model(run(base, tmp_path / "out", linear(*rules)).folder)
    assert model.described.keys() == {"model.embed_tokens.weight", "lm_head.weight"}
    check_reloaded(model, tmp_path / "out")


@pytest.mark.parametrize("method", WITH_DATA)
def test_an_embedding_has_no_inputs(method: str, tmp_path: Path) -> None:
    """Refused while planning, tied or not, and where it is tied that is said."""
    for name, match in (("llama", "embed"), ("llama-tied", "embed"), ("llama-tied", "lm_head")):
        (tmp_path / f"{name}-{match}").mkdir()
        base = make_base(tmp_path / f"{name}-{match}", name, num_hidden_layers=1)
        tied = ", and lm_head is tied to it" if name == "llama-tied" else ""
        said = f"embed_tokens.weight: an embedding has no input statistics{tied}; use a method without data"
        with pytest.raises(ValueError, match=said):
            run(base, tmp_path / "out", linear({"match": match, method: WITH_DATA[method]}))
        assert not (tmp_path / "out").exists()

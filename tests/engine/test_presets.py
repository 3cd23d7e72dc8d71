"""Presets on all families: they can be planned, or the refusal names a setting with which they can; and they run."""

import re
from pathlib import Path
from typing import Any

import pytest

import decoct
from decoct.model import open_model
from decoct.recipe import presets
from tests.engine.running import make_base
from tests.tiny import CONFIGS

WIDE = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "head_dim": 32, "num_attention_heads": 4}
WIDTHS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 128, "n_layer": 1},
    "opt": {**WIDE, "ffn_dim": 128, "word_embed_proj_dim": 128},
    "qwen3_moe": {**WIDE, "moe_intermediate_size": 64},
}
CHEAP = {
    "qtip.state_bits": 8,
    "e2e_qp.num_steps": 1,
    "block_ap.num_steps": 2,
    "block_ap.batch_size": 2,
    "distill.num_steps": 2,
    "distill.held_out": 2,
    "qat.num_steps": 2,
    "qat.held_out": 2,
    "data.num_sequences": 2,
    "data.sequence_length": 16,
}
REMEDIES = {
    ("gemma2", "w4a4kv4"): ["quarot.residual=false"],
    ("gemma3_text", "w4a4kv4"): ["quarot.residual=false"],
    ("olmo2", "w4a4kv4"): ["quarot.residual=false"],
    ("phi3", "w4a4kv4"): ["quarot.values=false"],
    ("gpt2", "w4a4kv4"): ["quarot.values=false"],
    ("gpt_neox", "w4a4kv4"): ["quarot.values=false"],
}
"""What the refusals name; everything else works as it is."""


def wide(folder: Path, family: str) -> Path:
    """A model whose widths are multiples of the presets' groups, and its heads of the cache policies'."""
    return make_base(folder, family, **WIDTHS.get(family, WIDE))


def settings(base: Path, preset: str) -> list[str]:
    """What makes a preset quick, as far as it has such settings."""
    known = re.findall(r"\w+", str([stage.description for stage in decoct.load_recipe(preset).stages]))
    found = [f"{key}={value}" for key, value in CHEAP.items() if key.split(".")[0] in ("data", *known)]
    return [*found, f"data.source={base.parent / 'text.txt'}"]


PARTICULAR = ["kv4", "w4", "w4a4kv4", "w8a8"]
"""Presets with steps that look at more than single matrices, or at roles; to the others all families are alike."""


@pytest.mark.parametrize("family", CONFIGS)
def test_presets_are_planned(family: str, tmp_path: Path) -> None:
    base = wide(tmp_path, family)
    model = open_model(base)
    for preset in PARTICULAR:
        chosen = settings(base, preset)
        for remedy in REMEDIES.get((family, preset), []):
            with pytest.raises(ValueError, match=rf"^[^\n]*\(--set {remedy}\)$"):
                decoct.plan(model, preset, settings=chosen)
            chosen.append(remedy)
        planned = decoct.plan(model, preset, settings=chosen)
        assert planned.bits_per_weight < (33 if preset == "kv4" else 16)


HEALING = {"heal"}
"""Presets for what is compressed already."""

STRUCTURE = {"depth4", "student-half", "width20"}
"""Presets whose results are plain checkpoints with fewer or smaller matrices."""


@pytest.mark.parametrize("preset", sorted(STRUCTURE))
@pytest.mark.parametrize("family", ["llama-tied", "gpt2"])
def test_presets_that_change_shapes_run(family: str, preset: str, tmp_path: Path) -> None:
    deep = {"n_layer": 6} if family == "gpt2" else {"num_hidden_layers": 6}
    base = make_base(tmp_path, family, **{**WIDTHS.get(family, WIDE), **deep})
    result = decoct.compress(base, preset, tmp_path / "out", settings=settings(base, preset))
    made = open_model(result.folder)
    assert not made.described
    assert made.num_parameters < 0.85 * open_model(base).num_parameters
    measured = decoct.evaluate(made, text=tmp_path / "text.txt", against=base, windows=2, length=16)
    assert measured.kl_mean is not None


def test_heal_follows_another(tmp_path: Path) -> None:
    """On the same base, which is then the teacher; the mask stays."""
    base = wide(tmp_path, "llama-tied")
    chosen = [*settings(base, "sparse50"), "distill.num_steps=2", "distill.held_out=2"]
    result = decoct.compress(base, ["sparse50", "heal"], tmp_path / "out", settings=chosen)
    assert len(result.losses) == 2
    assert open_model(result.folder).described["model.layers.0.mlp.up_proj.weight"]["kind"] == "Sparse"


def test_presets_one_after_another(tmp_path: Path) -> None:
    """What the guide shows: narrower first, then 4 bits with the preset's own groups of 64."""
    base = make_base(tmp_path, "llama", **{**WIDE, "intermediate_size": 320, "num_hidden_layers": 2})
    chosen = settings(base, "w4")
    result = decoct.compress(base, ["width20", "w4"], tmp_path / "out", settings=chosen)
    made = open_model(result.folder)
    assert made.config["intermediate_size"] in (128, 192, 256)
    assert made.described["model.layers.1.mlp.down_proj.weight"]["kind"] == "GroupInt"


@pytest.mark.parametrize("preset", sorted(presets().keys() - STRUCTURE - HEALING))
@pytest.mark.parametrize("family", ["llama-tied", "qwen3_moe", "gpt2"])
def test_presets_run(family: str, preset: str, tmp_path: Path) -> None:
    base = wide(tmp_path, family)
    chosen = [*settings(base, preset), *REMEDIES.get((family, preset), [])]
    result = decoct.compress(base, preset, tmp_path / "out", settings=chosen)
    made = open_model(result.folder)
    assert made.described or made.cache
    text = tmp_path / "text.txt"
    measured = decoct.evaluate(made, text=text, against=base, windows=2, length=16)
    assert measured.kl_mean is not None
    assert measured.kl_mean < 3

"""Checkpoint folders: what is opened, and what is refused in a sentence that names the file."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from decoct import compress
from decoct.model import DESCRIPTIONS, open_model
from decoct.store import INDEX, FolderSource, open_safetensors, open_source, save_safetensors
from tests.tiny import make_model

RTN = {"stages": [{"blocks": [{"linear": {"rtn": {"bits": 4, "group_size": 8}}}]}]}
EMBEDDING = {"stages": [{"blocks": [{"linear": {"match": "embed", "rtn": {"group_size": 8}}}]}]}
GPTQ = {
    "data": {"source": "self", "num_sequences": 2, "sequence_length": 8},
    "stages": [{"blocks": [{"linear": {"gptq": {"group_size": 8}}}]}],
}


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    make_model("llama").save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


@pytest.fixture
def compressed(sharded: Path, tmp_path: Path) -> Path:
    return compress(sharded, RTN, tmp_path / "out").folder


def test_shards_read_as_saved(sharded: Path) -> None:
    source = open_source(sharded)
    expected = make_model("llama").state_dict()
    assert set(source.names()) == expected.keys()
    for name, tensor in expected.items():
        assert source.shape(name) == tuple(tensor.shape)
        assert source.dtype(name) == tensor.dtype
        assert torch.equal(source.read(name), tensor)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"abc")


def overwrite(path: Path) -> None:
    path.write_bytes(b"<html>404</html>" * 10)


@pytest.mark.parametrize("damage", [cut, lengthen, overwrite, Path.unlink])
def test_a_damaged_shard_is_named(damage: Callable[[Path], None], sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    damage(shard)
    with pytest.raises(ValueError, match=shard.name):
        open_model(sharded)


def test_index_promises_a_missing_tensor(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["model.layers.9.mlp.up_proj.weight"] = next(iter(index["weight_map"].values()))
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"base: {INDEX} promises model\.layers\.9\.mlp\.up_proj\.weight"):
        open_model(sharded)


@pytest.mark.parametrize("name", ["config.json", INDEX])
@pytest.mark.parametrize("text", ['{"a": ', "[]", "{}", '{"weight_map": 3}'])
def test_damaged_json_is_named(name: str, text: str, sharded: Path) -> None:
    (sharded / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name}|architecture"):
        open_model(sharded)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("recipe", "name"),
    [
        (RTN, "model.layers.1.mlp.up_proj.weight"),
        (GPTQ, "model.layers.1.mlp.up_proj.weight"),
        (GPTQ, "model.layers.2.input_layernorm.weight"),
    ],
)
def test_weights_that_are_not_finite_are_named(recipe: dict[str, Any], name: str, value: float, tmp_path: Path) -> None:
    model = make_model("llama")
    model.get_parameter(name).data.view(-1)[3] = value
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        compress(tmp_path / "base", recipe, tmp_path / "out")


def test_a_model_without_one_of_its_tensors(tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path)
    tensors = {name: open_source(tmp_path).read(name) for name in open_source(tmp_path).names()}
    del tensors["model.layers.1.self_attn.v_proj.weight"]
    save_safetensors(tmp_path / "model.safetensors", tensors)
    with pytest.raises(ValueError, match=r"lacks 1 weights, first model\.layers\.1\.self_attn\.v_proj\.weight"):
        open_model(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    torch.save({"x": torch.zeros(2)}, tmp_path / name)
    with pytest.raises(ValueError, match=r"pickled.*convert them to safetensors"):
        open_source(tmp_path)


def test_what_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    for model in (tmp_path / "nowhere", tmp_path / "notes.txt", "~/nowhere", "just-a-word"):
        with pytest.raises(ValueError, match="neither a model folder"):
            open_source(model)
    with pytest.raises(ValueError, match=r"has no config\.json; it is not a Hugging Face model folder"):
        open_source(tmp_path)
    (tmp_path / ".run").mkdir()
    with pytest.raises(ValueError, match="was interrupted; run the same command again"):
        open_source(tmp_path)
    with pytest.raises(ValueError, match="someone/some-model is no local folder and could not be downloaded"):
        open_source("someone/some-model")


def test_a_foreign_quantization_is_refused(sharded: Path) -> None:
    config = json.loads((sharded / "config.json").read_text())
    (sharded / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(ValueError, match=r"already quantized \(awq\).*use the original"):
        open_model(sharded)


def test_verify_names_the_shard_with_a_flipped_byte(compressed: Path, tmp_path: Path) -> None:
    source = open_source(compressed)
    assert isinstance(source, FolderSource)
    source.verify()
    shard = sorted(compressed.glob("*.safetensors"))[2]
    data = bytearray(shard.read_bytes())
    data[-5] ^= 0x10
    shard.write_bytes(data)
    with pytest.raises(ValueError, match=rf"{shard.name} is corrupt: its checksum differs from decoct\.json"):
        source.verify()
    with pytest.raises(ValueError, match=shard.name):
        compress(compressed, EMBEDDING, tmp_path / "b")


def rewrite_metadata(shard: Path, text: str) -> None:
    opened = open_safetensors(shard)
    save_safetensors(shard, {name: opened.read(name) for name in opened.tensors}, {DESCRIPTIONS: text})


@pytest.mark.parametrize("text", ["{", "[]", '{"format_version": 1}', '{"format_version": "x", "weights": {}}'])
def test_damaged_descriptions_are_named(text: str, compressed: Path) -> None:
    shard = sorted(compressed.glob("*.safetensors"))[2]
    rewrite_metadata(shard, text)
    with pytest.raises(ValueError, match=shard.name):
        open_model(compressed)


def test_a_newer_format_says_so(compressed: Path) -> None:
    shard = sorted(compressed.glob("*.safetensors"))[2]
    rewrite_metadata(shard, '{"format_version": 99, "weights": {}}')
    with pytest.raises(ValueError, match=rf"{shard.name}.*99"):
        open_model(compressed)


def test_files_that_are_not_the_model_are_left_out(tmp_path: Path) -> None:
    """Some publishers put a second copy of the weights, in another layout, beside model.safetensors."""
    make_model("llama").save_pretrained(tmp_path)
    before = open_model(tmp_path).num_parameters
    save_safetensors(tmp_path / "consolidated.safetensors", {"layers.0.attention.wq.weight": torch.zeros(32, 32)})
    assert open_model(tmp_path).num_parameters == before

"""AWQ folders hold decoct's own integers, as a reader written from the format's description finds them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import decoct
from decoct.model import open_model
from tests.engine.running import make_base, run
from tests.export.readers import awq_matrix, read_folder
from tests.export.test_gptq import compress, config_of

GRIDS: dict[str, tuple[dict[str, Any], int]] = {
    "symmetric": ({"group_size": 32}, 32),
    "with zero points": ({"group_size": 32, "symmetric": False}, 32),
    "scales searched for, some negative": ({"group_size": 32, "clip_search": True}, 32),
    "a whole row": ({"group_size": "channel", "symmetric": False}, -1),
    "one scale": ({"group_size": "tensor"}, -1),
}


def compare_all(out: Path, folder: Path) -> int:
    """Every matrix that is not left alone is the same to the last bit; gives how many there are."""
    model, tensors, config, count = open_model(out), read_folder(folder), config_of(folder), 0
    for name in model.slots():
        stem = name.removesuffix(".weight")
        left = stem == "model.embed_tokens" or any(each in stem for each in config["modules_to_not_convert"])
        assert left == (name in tensors)
        if not left:
            theirs = awq_matrix(tensors, stem, config["group_size"])
            assert np.array_equal(theirs, model.weight(name).unpack(torch.float32).double().numpy())
            count += 1
    return count


@pytest.mark.parametrize("what", GRIDS)
def test_integers_are_written_as_they_are(what: str, tmp_path: Path) -> None:
    grid, size = GRIDS[what]
    out = compress(tmp_path, {"linear": {"rtn": grid}}, num_hidden_layers=1)
    report = decoct.export(out, "awq", tmp_path / "awq")
    assert report.ok
    assert "largest relative error 0.0e+00" in report.checks[1].detail
    config = config_of(tmp_path / "awq")
    assert {"quant_method": "awq", "version": "gemm", "bits": 4, "zero_point": True, "group_size": size}.items() <= (
        config.items()
    )
    assert json.loads((tmp_path / "awq" / "quant_config.json").read_text()) == config
    assert compare_all(out, tmp_path / "awq") == 7
    if grid.get("clip_search"):
        assert float(read_folder(tmp_path / "awq")["model.layers.0.mlp.up_proj.scales"].min()) < 0


def test_one_group_size_for_all(tmp_path: Path) -> None:
    """Groups of 64 and 32, and whole rows of 192, are all written as 32, with scales repeated: the same values."""
    rules = [
        {"match": "mlp.down", "rtn": {"group_size": "channel"}},
        {"match": "attn.*", "rtn": {"group_size": 64, "symmetric": False}},
        {"match": "mlp.*", "rtn": {"group_size": 32}},
    ]
    out = compress(tmp_path, {"linear": [{"match": "1.mlp.down", "rtn": {"group_size": 96}}, *rules]})
    report = decoct.export(out, "awq", tmp_path / "awq")
    assert report.ok
    assert config_of(tmp_path / "awq")["group_size"] == 32
    assert compare_all(out, tmp_path / "awq") == 14
    assert "groups of 192 are written as 32, scales repeated (1)" in report.notes


def test_what_does_not_fit(tmp_path: Path) -> None:
    rules = [
        {"match": "mlp.down", "rtn": {"group_size": 16}},
        {"match": "attn.o", "rtn": {"bits": 3, "group_size": 32}},
        {"match": "*", "rtn": {"group_size": 32}},
    ]
    out = compress(tmp_path, {"linear": rules}, num_hidden_layers=1)
    said = r"AWQ cannot hold .*o_proj\.weight: it is 3-bit integers, .* has 4 bits; .*, export as gptq, which"
    with pytest.raises(ValueError, match=said):
        decoct.export(out, "awq", tmp_path / "awq")
    report = decoct.export(out, "awq", tmp_path / "awq", fold=True)
    assert report.ok
    config = config_of(tmp_path / "awq")
    assert config["group_size"] == 16
    assert config["modules_to_not_convert"] == ["lm_head", "self_attn.o_proj"]
    assert compare_all(out, tmp_path / "awq") == 6


def test_group_sizes_without_a_common_one_are_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path, "llama", hidden_size=64, intermediate_size=200, num_hidden_layers=1)
    rules = [{"match": "mlp.down", "rtn": {"group_size": "channel"}}, {"match": "*", "rtn": {"group_size": 32}}]
    out = run(base, tmp_path / "out", {"linear": rules}).folder
    with pytest.raises(ValueError, match=r"AWQ has one group size .* groups of a row, 32; use one group_size"):
        decoct.export(out, "awq", tmp_path / "awq")

"""OpenVINO folders, read back and run by its CPU plugin, beside the model that they were made of."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest
import torch

import decoct
from decoct.exporters import check_expected, export_model
from decoct.exporters.compare import our_logits
from decoct.exporters.in_openvino import OpenVinoDecoder
from decoct.exporters.llama_like import angles_of
from decoct.model import open_model
from tests.cli.test_commands import invoke
from tests.engine.running import make_base, run
from tests.export.drawn import WIDE, all_ok, largest_difference


@pytest.mark.parametrize("name", ["llama", "llama-tied", "mistral", "qwen2", "qwen3"])
def test_families_run_in_openvino(name: str, tmp_path: Path) -> None:
    """Rotary positions, norms, biases, windows."""
    base = make_base(tmp_path, name, **WIDE, attention_bias=True)
    all_ok(export_model(open_model(base), "openvino", tmp_path / "out"))
    assert largest_difference(base, OpenVinoDecoder(tmp_path / "out", context=40, rounded=False)) < 2e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_uncompressed_matrices_stay_in_16_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    base = make_base(tmp_path, "llama-tied", dtype, **WIDE)
    all_ok(export_model(open_model(base), "openvino", tmp_path / "out"))
    stored = (tmp_path / "out" / "openvino_model.bin").stat().st_size
    assert stored < 2 * open_model(base).num_parameters + 2 * 4 * 64 * 8 + 4096  # and cosines and sines


INTEGERS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "4 bits": ({"rtn": {"bits": 4, "group_size": 16}}, {"i4"}),
    "negative scales": ({"rtn": {"bits": 4, "group_size": 16, "clip_search": True}}, {"i4"}),
    "4 bits with zero points": ({"rtn": {"group_size": 16, "symmetric": False}}, {"u4"}),
    "3 bits in groups of 8": ({"rtn": {"bits": 3, "group_size": 8}}, {"i4"}),
    "2 bits": ({"rtn": {"bits": 2, "group_size": 16}}, {"u2"}),
    "2 bits with zero points": ({"rtn": {"bits": 2, "group_size": 16, "symmetric": False}}, {"u2"}),
    "8 bits": ({"rtn": {"bits": 8, "group_size": 16}}, {"i8"}),
    "5 bits with zero points": ({"rtn": {"bits": 5, "group_size": 16, "symmetric": False}}, {"u8"}),
    "a whole row": ({"rtn": {"bits": 4, "group_size": "channel"}}, {"i4"}),
    "one scale": ({"rtn": {"bits": 8, "group_size": "tensor"}}, {"i8"}),
}


@pytest.mark.parametrize("what", INTEGERS)
def test_integers_are_written_as_they_are(what: str, tmp_path: Path) -> None:
    """Those of the embedding, which is lm_head too, once."""
    method, kinds = INTEGERS[what]
    base = make_base(tmp_path, "llama-tied", **WIDE)
    out = run(base, tmp_path / "o", {"linear": {"match": ["embed", "*"], **method}}).folder
    report = export_model(open_model(out), "openvino", tmp_path / "out")
    all_ok(report)
    assert report.notes[0].endswith("15 of 15 matrices hold decoct's own integers")
    assert largest_difference(out, OpenVinoDecoder(tmp_path / "out", context=40, rounded=False)) < 2e-5
    constants = openvino.Core().read_model(tmp_path / "out" / "openvino_model.xml").get_ops()
    found = [each for each in constants if each.get_friendly_name().endswith(".codes")]
    assert len(found) == 15
    assert {each.get_element_type().get_type_name() for each in found} == kinds


@pytest.mark.parametrize("method", [{"hqq": {"group_size": 16}}, {"ternary": {"group_size": 16}}])
def test_other_weights_are_held_too(method: dict[str, Any], tmp_path: Path) -> None:
    base = make_base(tmp_path, "llama", **WIDE)
    out = run(base, tmp_path / "o", {"linear": {"match": "mlp.*", **method}}).folder
    all_ok(export_model(open_model(out), "openvino", tmp_path / "out"))


def test_a_trained_model(stories: Path, tmp_path: Path) -> None:
    small = {"match": ["embed", "attn.*", "mlp.gate", "mlp.up"], "rtn": {"bits": 8, "group_size": 32}}
    out = decoct.compress(stories, {"stages": [{"blocks": [{"linear": small}]}]}, tmp_path / "o").folder
    report = decoct.export(out, "openvino", tmp_path / "out")
    all_ok(report)
    assert "a little girl named Lily" in str(report.text)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "config.json", "openvino_model.bin", "decoct-export.json"} <= names
    assert not [name for name in names if "partial" in name]


def test_sequences_of_different_length_in_one_batch(tmp_path: Path) -> None:
    """As openvino-genai runs them: what fills the shorter one up stands in front."""
    base = make_base(tmp_path, "llama", **WIDE)
    export_model(open_model(base), "openvino", tmp_path / "out", load=False)
    settings = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    request = openvino.Core().compile_model(tmp_path / "out" / "openvino_model.xml", "CPU", settings)
    tokens = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = np.ones((2, 9), np.int64)
    mask[1, :3] = 0
    inputs = {
        "input_ids": tokens.numpy(), "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clip(0),
        "beam_idx": np.arange(2, dtype=np.int32),
    }  # fmt: skip
    found = request.create_infer_request().infer(inputs)["logits"]
    model = open_model(base)
    for row, begin in ((0, 0), (1, 3)):
        ours = our_logits(model, tokens[row, begin:])[-1]
        assert float((ours - torch.from_numpy(found[row, 0])).abs().max()) < 2e-5


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base(tmp_path, "llama", **WIDE)
    floats = run(base, tmp_path / "m", {"linear": {"mxfp": {"format": "mxfp4"}, "match": "mlp.up"}}).folder
    with pytest.raises(
        ValueError, match=r"OpenVINO has no kernel for .*up_proj.*: it is a FloatBlock weight; quantize"
    ):
        decoct.export(floats, "openvino", tmp_path / "out")
    all_ok(decoct.export(floats, "openvino", tmp_path / "folded", fold=True))
    other = make_base(tmp_path / "other", "gpt2")
    with pytest.raises(ValueError, match=r"a gpt2 model cannot be drawn as a graph yet \(only llama, "):
        check_expected(open_model(other), "openvino")
    monkeypatch.setattr("decoct.exporters.openvino.write.find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"pip install 'decoct\[openvino\]'"):
        check_expected(open_model(base), "openvino")
    assert not (tmp_path / "out").exists()


def test_a_difference_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sines of the wrong sign: the folder loads, and is wrong."""
    base = make_base(tmp_path, "llama", **WIDE)
    kinds, blocks = angles_of(open_model(base), 64)
    wrong = [(cosines, -sines) for cosines, sines in kinds]
    monkeypatch.setattr("decoct.exporters.openvino.draw.angles_of", lambda model, context: (wrong, blocks))
    result = invoke("export", base, "--to", "openvino", "-o", tmp_path / "out", "--json")
    assert result.exit_code == 1
    assert [check["name"] for check in json.loads(result.stdout)["checks"] if check["ok"] is False] == ["logits"]

"""ONNX folders, read by the onnx package and run by onnxruntime, beside the model that they were made of."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

import decoct
from decoct.exporters import check_expected, export_model
from decoct.exporters.compare import our_logits
from decoct.exporters.held import Held, codes_of
from decoct.exporters.in_onnxruntime import OnnxDecoder
from decoct.exporters.llama_like import angles_of
from decoct.exporters.onnx.draw import pack
from decoct.model import open_model
from decoct.ops.grid import Grid
from decoct.weights import GroupInt
from tests.cli.test_commands import invoke
from tests.engine.running import make_base, run
from tests.export.drawn import WIDE, all_ok, largest_difference


@pytest.mark.parametrize("head_dim", [8, 16])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "mistral", "qwen2", "qwen3"])
def test_families_run_in_onnxruntime(name: str, head_dim: int, tmp_path: Path) -> None:
    """Rotary positions (of heads that GroupQueryAttention turns, and smaller ones), norms, biases, windows."""
    base = make_base(tmp_path, name, **{**WIDE, "head_dim": head_dim}, attention_bias=True)
    report = export_model(open_model(base), "onnx", tmp_path / "out")
    all_ok(report)
    assert any("one sequence at a time" in note for note in report.notes) == (head_dim == 8)
    assert largest_difference(base, OnnxDecoder(tmp_path / "out", context=40)) < 2e-5


ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
    "llama3": {
        "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 10000.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 16},
}  # fmt: skip


@pytest.mark.parametrize("kind", ROPES)
def test_scaled_positions(kind: str, tmp_path: Path) -> None:
    base = make_base(tmp_path, "llama", **WIDE, rope_parameters=ROPES[kind])
    export_model(open_model(base), "onnx", tmp_path / "out", load=False)
    assert largest_difference(base, OnnxDecoder(tmp_path / "out", context=40)) < 2e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_uncompressed_matrices_stay_in_16_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    base = make_base(tmp_path, "llama-tied", dtype, **WIDE)
    report = export_model(open_model(base), "onnx", tmp_path / "out")
    all_ok(report)
    data = tmp_path / "out" / "model.onnx.data"
    assert data.stat().st_size < 2.2 * open_model(base).num_parameters + 15 * 4096


INTEGERS: dict[str, tuple[dict[str, Any], str]] = {
    "4 bits": ({"bits": 4, "group_size": 16}, "4-bit in groups of 16"),
    "with clipping, so scales are negative": ({"bits": 4, "group_size": 16, "clip_search": True}, "4-bit in groups of"),
    "4 bits with zero points": ({"group_size": 16, "symmetric": False}, "4-bit in groups of 16 with zero points"),
    "3 bits": ({"bits": 3, "group_size": 16}, "4-bit in groups of 16"),
    "2 bits with zero points": ({"bits": 2, "group_size": 16, "symmetric": False}, "2-bit in groups of 16 with zero"),
    "8 bits": ({"bits": 8, "group_size": 16}, "8-bit in groups of 16"),
    "5 bits with zero points": ({"bits": 5, "group_size": 16, "symmetric": False}, "8-bit in groups of 16 with zero"),
    "a whole row": ({"bits": 4, "group_size": "channel"}, "4-bit in groups of 64"),
    "one scale": ({"bits": 8, "group_size": "tensor"}, "8-bit in groups of 64"),
}


@pytest.mark.parametrize("what", INTEGERS)
def test_integers_are_written_as_they_are(what: str, tmp_path: Path) -> None:
    """Those of the embedding, which is lm_head too, once."""
    settings, words = INTEGERS[what]
    base = make_base(tmp_path, "llama-tied", **WIDE)
    out = run(base, tmp_path / "o", {"linear": {"match": ["embed", "*"], "rtn": settings}}).folder
    report = export_model(open_model(out), "onnx:unrounded", tmp_path / "out")
    all_ok(report)
    assert words in report.notes[0]
    assert report.notes[0].endswith("15 of 15 matrices hold decoct's own integers")
    assert largest_difference(out, OnnxDecoder(tmp_path / "out", context=40)) < 2e-5
    kinds = [node.op_type for node in onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph.node]
    assert (kinds.count("MatMulNBits"), kinds.count("GatherBlockQuantized"), kinds.count("FusedMatMul")) == (15, 1, 0)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("size", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("zero", ["middle", "integer", "real"])
def test_the_kernel_multiplies_with_what_we_mean(bits: int, size: int, zero: str) -> None:
    """Negative scales and zero points of all kinds, beside float64; inputs unrounded, and rounded to 8 bits."""
    if zero == "real" and bits == 8:
        pytest.skip("onnxruntime has no such kernel, and it is refused")
    drawn = torch.Generator().manual_seed(bits + size)
    rows, groups = 24, 3
    scale = torch.randn(rows, groups, generator=drawn).half()
    zeros = {
        "middle": None,
        "integer": torch.randint(2**bits, (rows, groups), generator=drawn).to(torch.uint8),
        "real": (torch.rand(rows, groups, generator=drawn) * 2**bits).half(),
    }[zero]
    codes = torch.randint(2**bits, (rows, groups * size), generator=drawn).to(torch.uint8)
    weight = GroupInt.of(codes, Grid(scale, zeros, bits, size), torch.float32)
    assert (scale < 0).any()
    held = Held(bits, size, zero)  # type: ignore[arg-type]
    x = torch.randn(5, groups * size, generator=drawn)
    exact = x.double() @ weight.unpack(torch.float64).T
    for level, most in ((1, 1e-6), (4, 2e-2)):
        found = torch.from_numpy(multiply(x.numpy(), weight, held, level))
        assert float((found - exact).norm() / exact.norm()) < most


def multiply(x: np.ndarray, weight: GroupInt, held: Held, level: int) -> np.ndarray:
    """MatMulNBits alone."""
    codes, (rows, cols) = codes_of(weight, held), weight.shape
    given = {"codes": pack(codes.codes, held.bits or 0), "scale": codes.scale}
    if held.zero != "middle":
        given["zero"] = codes.zero if held.zero == "real" else pack(codes.zero.to(torch.uint8), held.bits or 0)
    node = helper.make_node(
        "MatMulNBits", ["x", *given], ["y"], domain="com.microsoft", K=cols, N=rows, bits=held.bits,
        block_size=held.group, accuracy_level=level,
    )  # fmt: skip
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy"]
    tensors = [onnx.numpy_helper.from_array(tensor.numpy(), name) for name, tensor in given.items()]
    graph = helper.make_graph([node], "one", [ends[0]], [ends[1]], tensors)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0]


OTHERS: dict[str, dict[str, Any]] = {"hqq": {"hqq": {"group_size": 16}}, "ternary": {"ternary": {"group_size": 16}}}


@pytest.mark.parametrize("what", OTHERS)
def test_other_weights_are_held_too(what: str, tmp_path: Path) -> None:
    base = make_base(tmp_path, "llama", **WIDE)
    out = run(base, tmp_path / "o", {"linear": {"match": "mlp.*", **OTHERS[what]}}).folder
    all_ok(export_model(open_model(out), "onnx", tmp_path / "out"))


def test_pruned_integers_stay_pruned(tmp_path: Path) -> None:
    base = make_base(tmp_path, "llama", **WIDE)
    rtn = {"linear": {"rtn": {"bits": 4, "group_size": 16}}}
    out = run(base, tmp_path / "o", {"linear": {"wanda": {}}}, rtn).folder
    report = export_model(open_model(out), "onnx", tmp_path / "out")
    all_ok(report)
    assert "relative error 0.0e+00" in report.checks[0].detail


def test_a_trained_model(stories: Path, tmp_path: Path) -> None:
    small = {"match": ["embed", "attn.*", "mlp.gate", "mlp.up"], "rtn": {"bits": 8, "group_size": 32}}
    out = decoct.compress(stories, {"stages": [{"blocks": [{"linear": small}]}]}, tmp_path / "o").folder
    report = decoct.export(out, "onnx", tmp_path / "out")
    all_ok(report)
    assert "a little girl named Lily" in str(report.text)
    config = json.loads((tmp_path / "out" / "genai_config.json").read_text())["model"]
    assert (config["type"], config["decoder"]["head_size"], config["eos_token_id"]) == ("llama", 8, 2)
    assert {"tokenizer.json", "config.json", "decoct-export.json"} <= {p.name for p in (tmp_path / "out").iterdir()}


def test_sequences_of_different_length_in_one_batch(tmp_path: Path) -> None:
    """As onnxruntime-genai runs them: what fills the shorter one up stands behind it."""
    base = make_base(tmp_path, "llama", **WIDE)
    export_model(open_model(base), "onnx", tmp_path / "out", load=False)
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    tokens = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(1))
    empty = np.zeros((2, 2, 0, 16), np.float32)
    feeds = {each.name: empty for each in session.get_inputs() if each.name.startswith("past")}
    mask = np.ones((2, 9), np.int64)
    mask[1, 6:] = 0
    (found,) = session.run(["logits"], {"input_ids": tokens.numpy(), "attention_mask": mask, **feeds})
    model = open_model(base)
    for row, length in ((0, 9), (1, 6)):
        ours = our_logits(model, tokens[row, :length])[-1]
        assert float((ours - torch.from_numpy(found[row, 0])).abs().max()) < 2e-5


def test_refusals_name_what_holds_it(tmp_path: Path) -> None:
    base = make_base(tmp_path, "llama", **WIDE)
    fine = run(base, tmp_path / "f", {"linear": {"rtn": {"group_size": 8}}}).folder
    with pytest.raises(
        ValueError, match=r"ONNX has no kernel for .*q_proj.* in groups of 8; use groups of a multiple of"
    ):
        decoct.export(fine, "onnx", tmp_path / "out")
    report = decoct.export(fine, "onnx", tmp_path / "folded", fold=True)
    all_ok(report)
    assert report.notes[0].startswith("16 uncompressed; 0 of 16")
    wide = run(base, tmp_path / "w", {"linear": {"hqq": {"bits": 5, "group_size": 16}}}).folder
    with pytest.raises(
        ValueError, match=r"5-bit integers, with real zero points.*; quantize with zero: integer, .* gguf"
    ):
        decoct.export(wide, "onnx", tmp_path / "out")
    floats = run(base, tmp_path / "m", {"linear": {"mxfp": {"format": "mxfp4"}, "match": "mlp.up"}})
    with pytest.raises(
        ValueError, match=r"is a FloatBlock weight; quantize to integers .* export as compressed_tensors"
    ):
        decoct.export(floats.folder, "onnx", tmp_path / "out")
    rounded = run(base, tmp_path / "r", {"linear": {"rtn": {"group_size": 16}}}, {"linear": {"inputs": {}}}).folder
    with pytest.raises(ValueError, match=r"cannot say that the inputs of .* are rounded; add --fold"):
        decoct.export(rounded, "onnx", tmp_path / "out")
    assert "4-bit" in decoct.export(rounded, "onnx", tmp_path / "without", fold=True, load=False).notes[0]
    with pytest.raises(ValueError, match="did you mean onnx:unrounded"):
        decoct.export(base, "onnx:unround", tmp_path / "out")
    other = make_base(tmp_path / "other", "gpt2")
    with pytest.raises(ValueError, match=r"a gpt2 model cannot be drawn as a graph yet \(only llama, "):
        check_expected(open_model(other), "onnx")
    turned = make_base(tmp_path / "turned", "llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0})
    with pytest.raises(ValueError, match="rotary positions scaled by dynamic cannot be drawn"):
        check_expected(open_model(turned), "onnx")
    assert not (tmp_path / "out").exists()


def test_a_difference_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sines of the wrong sign: the folder loads, and is wrong."""
    base = make_base(tmp_path, "llama", **WIDE)
    kinds, blocks = angles_of(open_model(base), 64)
    wrong = [(cosines, -sines) for cosines, sines in kinds]
    monkeypatch.setattr("decoct.exporters.onnx.draw.angles_of", lambda model, context: (wrong, blocks))
    result = invoke("export", base, "--to", "onnx", "-o", tmp_path / "out", "--json")
    assert result.exit_code == 1
    assert "out was written, but differs: logits: KL" in result.stderr
    assert [check["name"] for check in json.loads(result.stdout)["checks"] if check["ok"] is False] == ["logits"]
    assert (tmp_path / "out" / "genai_config.json").exists()


def test_a_missing_package_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base(tmp_path, "llama", **WIDE)
    monkeypatch.setattr("decoct.exporters.onnx.verify.find_spec", lambda _: None)
    report = decoct.export(base, "onnx", tmp_path / "out")
    (load,) = (check for check in report.checks if check.name == "load")
    assert (load.ok, "pip install 'decoct[onnx]'" in load.detail) == (None, True)
    monkeypatch.setattr("decoct.exporters.onnx.write.find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"writing ONNX needs the onnx package: pip install 'decoct\[onnx\]'"):
        check_expected(open_model(base), "onnx")

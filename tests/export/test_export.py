"""Exports are loaded by the engine they are for, without decoct, and give our logits."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from decoct.exporters import export_model
from decoct.exporters.compressed_tensors import _pack
from decoct.model import open_model
from decoct.ops.input_grid import InputGrid
from decoct.weights import FloatBlock, Masked
from tests.arch.test_families import our_logits
from tests.engine.running import make_base, run
from tests.engine.test_inputs import our_logits as rounded_logits
from tests.hf.test_from_pretrained import compress
from tests.tiny import save_model

LOAD = """
import sys, torch, warnings
from transformers import AutoModelForCausalLM, CompressedTensorsConfig
# transformers 5.23 with compressed-tensors 0.20 cannot keep asymmetric weights packed; it can unpack them on loading.
asymmetric = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if sys.argv[4] == "asymmetric" else {}
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, **asymmetric)
assert "decoct" not in sys.modules
with torch.no_grad():
    torch.save(model(torch.load(sys.argv[2])).logits.float(), sys.argv[3])
"""
SCHEMES = {
    "4 bit groups": {"bits": 4, "group_size": 8},
    "3 bit groups": {"bits": 3, "group_size": 16},
    "8 bit channel": {"bits": 8, "group_size": "channel"},
    "4 bit asymmetric": {"bits": 4, "group_size": 16, "symmetric": False},
    "8 bit tensor": {"bits": 8, "group_size": "tensor"},
}
FLOATS = {
    "fp8": [{"mxfp": {"format": "fp8"}}],
    "fp8 tensor": [{"mxfp": {"format": "fp8", "group_size": "tensor"}}],
    "mxfp8": [{"mxfp": {"format": "mxfp8"}}],
    "mxfp6": [{"mxfp": {"format": "mxfp6"}}],
    "mxfp4": [{"mxfp": {"format": "mxfp4"}}],
    "nvfp4": [{"mxfp": {"format": "nvfp4"}}],
    "fp8 and integers": [
        {"match": "attn.*", "mxfp": {"format": "fp8"}},
        {"match": "*", "rtn": {"bits": 4, "group_size": 8}},
    ],
}


def foreign_logits(folder: Path, tokens: torch.Tensor, scratch: Path, *, symmetric: bool = True) -> torch.Tensor:
    torch.save(tokens, scratch / "tokens.pt")
    command = [sys.executable, "-c", LOAD, str(folder), str(scratch / "tokens.pt"), str(scratch / "logits.pt")]
    command.append("symmetric" if symmetric else "asymmetric")
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "UNEXPECTED" not in done.stderr
    assert "MISSING" not in done.stderr
    return torch.load(scratch / "logits.pt")


@pytest.mark.parametrize("scheme", SCHEMES)
@torch.no_grad()
def test_compressed_tensors_in_transformers(scheme: str, tmp_path: Path) -> None:
    save_model("llama", tmp_path / "base")
    compress(tmp_path / "base", tmp_path / "out", [{"linear": {"rtn": SCHEMES[scheme]}}])
    model = open_model(tmp_path / "out")
    export_model(model, "compressed_tensors", tmp_path / "ct")
    tokens = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(1))
    symmetric = SCHEMES[scheme].get("symmetric", True)
    theirs = foreign_logits(tmp_path / "ct", tokens, tmp_path, symmetric=symmetric)
    # Unpacked on use, weights are in the model's dtype; unpacked on loading, in the stored scales'.
    ours = our_logits(model, tokens, unpack=torch.float32 if symmetric else torch.bfloat16)
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scheme", FLOATS)
@torch.no_grad()
def test_floats_in_transformers(scheme: str, tmp_path: Path) -> None:
    save_model("llama", tmp_path / "base", intermediate_size=64)
    compress(tmp_path / "base", tmp_path / "out", [{"linear": FLOATS[scheme]}])
    model = open_model(tmp_path / "out")
    export_model(model, "compressed_tensors", tmp_path / "ct")
    tokens = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(1))
    packed = scheme.startswith("fp8")  # the others are unpacked in bfloat16, and fail in a float32 model
    theirs = foreign_logits(tmp_path / "ct", tokens, tmp_path, symmetric=packed)
    ours = our_logits(model, tokens, unpack=torch.float32 if packed else torch.bfloat16)
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


W8: dict[str, Any] = {"linear": {"rtn": {"bits": 8, "group_size": "channel"}}}
W4: dict[str, Any] = {"linear": {"rtn": {"bits": 4, "group_size": 8}}}
FP8: dict[str, Any] = {"linear": {"mxfp": {"format": "fp8"}}}
INPUTS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "W8A8": (W8, {"bits": 8}, "int-quantized"),
    "W8A8 static": (W8, {"group_size": "tensor"}, "int-quantized"),
    "W8A8 asymmetric": (W8, {"symmetric": False}, "int-quantized"),
    "W4A8": (W4, {"bits": 8}, "int-quantized"),
    "W4A4": (W4, {"bits": 4}, "int-quantized"),
    "W4A8, inputs in FP8": (W4, {"format": "fp8"}, "int-quantized"),
    "FP8 dynamic": (FP8, {"format": "fp8"}, "float-quantized"),
    "FP8 static": (
        {"linear": {"mxfp": {"format": "fp8", "group_size": "tensor"}}},
        {"format": "fp8", "group_size": "tensor"},
        "float-quantized",
    ),
}


@pytest.mark.parametrize("scheme", INPUTS)
@torch.no_grad()
def test_rounded_inputs_in_transformers(scheme: str, tmp_path: Path) -> None:
    """Exactly ours, but for symmetric integers by token.

    There compressed-tensors' own arithmetic spreads a token's span over 2^b - 1 steps, while engines' kernels, and we,
    put the largest input onto code 2^(b-1) - 1. So both differ from what inputs as they are would give, equally.
    """
    weights, inputs, form = INPUTS[scheme]
    base = make_base(tmp_path, intermediate_size=64)
    model = open_model(run(base, tmp_path / "out", weights, {"linear": {"inputs": inputs}}).folder)
    export_model(model, "compressed_tensors", tmp_path / "ct")
    config = json.loads((tmp_path / "ct" / "config.json").read_text())["quantization_config"]
    (group,) = config["config_groups"].values()
    assert config["format"] == group["format"] == form
    assert group["input_activations"]["dynamic"] == (inputs.get("group_size") != "tensor")
    tokens = torch.randint(3, 60, (2, 24), generator=torch.Generator().manual_seed(1))
    theirs = foreign_logits(tmp_path / "ct", tokens, tmp_path)
    ours, plain = rounded_logits(model), rounded_logits(model, plain=True)
    if scheme in ("W8A8", "W4A8", "W4A4"):
        lost, their_loss = (float((logits - plain).square().mean()) for logits in (ours, theirs))
        assert lost <= their_loss < 1.5 * lost
    else:
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
        assert float((ours - plain).abs().max()) > 0.01


@torch.no_grad()
def test_symmetric_inputs_differ_by_half_a_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token's scale is max|x| / 127 here and max|x| / 127.5 there; that is most of the difference.

    With the other divisor ours are nearly theirs: a token's largest input then lies between two codes, and may take
    either.
    """
    base = make_base(tmp_path)
    model = open_model(run(base, tmp_path / "out", W8, {"linear": {"inputs": {"bits": 8}}}).folder)
    export_model(model, "compressed_tensors", tmp_path / "ct")
    tokens = torch.randint(3, 60, (2, 24), generator=torch.Generator().manual_seed(1))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ct", dtype=torch.float32)(tokens).logits
    ours, plain = rounded_logits(model), rounded_logits(model, plain=True)
    assert InputGrid(bits=8).largest == 127
    monkeypatch.setattr(InputGrid, "largest", 127.5)
    alike = rounded_logits(model)
    near, far, lost = (float((a - b).abs().median()) for a, b in ((alike, theirs), (ours, theirs), (ours, plain)))
    assert near < 0.2 * far, "the divisor explains the difference"
    assert far < 2 * lost, "which is no larger than what rounding costs"


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        ({"clip_ratio": 0.9}, "a weight whose inputs are rounded but for some features, or clipped"),
        ({"group_size": 16}, "a weight with inputs in int by blocks of 16"),
        ({"format": "mxfp8"}, "a weight with inputs in mxfp8 by blocks of 32"),
    ],
)
def test_rounded_inputs_that_no_scheme_can_say_are_refused(inputs: dict[str, Any], reason: str, tmp_path: Path) -> None:
    base = make_base(tmp_path, intermediate_size=64)
    model = open_model(run(base, tmp_path / "out", W8, {"linear": {"inputs": inputs}}).folder)
    with pytest.raises(ValueError, match=rf"q_proj\.weight: it is {reason}.*--fold"):
        export_model(model, "compressed_tensors", tmp_path / "ct")
    with pytest.raises(
        ValueError, match=r"a dense checkpoint cannot say that the inputs of .* are rounded; add --fold"
    ):
        export_model(model, "dense", tmp_path / "dense")


@torch.no_grad()
def test_dense_in_transformers(tmp_path: Path) -> None:
    save_model("gpt2", tmp_path / "base")
    compress(
        tmp_path / "base",
        tmp_path / "out",
        [{"linear": {"match": ["embed", "*"], "rtn": {"bits": 4, "group_size": 8}}}],
    )
    model = open_model(tmp_path / "out")
    export_model(model, "dense", tmp_path / "dense")
    tokens = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(1))
    theirs = foreign_logits(tmp_path / "dense", tokens, tmp_path)
    torch.testing.assert_close(theirs, our_logits(model, tokens), rtol=1e-4, atol=1e-5)
    assert open_model(tmp_path / "dense").described == {}


def test_refusals_say_what_to_do(tmp_path: Path) -> None:
    save_model("llama-tied", tmp_path / "base")
    compress(tmp_path / "base", tmp_path / "out", [{"linear": {"match": "embed", "rtn": {"bits": 8, "group_size": 8}}}])
    model = open_model(tmp_path / "out")
    with pytest.raises(ValueError, match=r"embed_tokens\.weight: it is a quantized embed.*--fold"):
        export_model(model, "compressed_tensors", tmp_path / "ct")
    with pytest.raises(ValueError, match="did you mean compressed_tensors"):
        export_model(model, "compressed-tensor", tmp_path / "ct")
    compress(
        tmp_path / "base", tmp_path / "mixed", [{"linear": [{"match": "attn.q", "rtn": {"bits": 8, "group_size": 8}}]}]
    )
    with pytest.raises(ValueError, match=r"attn.q, attn.k, attn.v have different schemes"):
        export_model(open_model(tmp_path / "mixed"), "compressed_tensors", tmp_path / "ct")


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ({"hqq": {"group_size": 8}}, "integers with real zero points; quantize with zero: integer"),
        ({"mxfp": {"format": "mxfp4", "group_size": 16}}, "e2m1 numbers with e8m0 scales for blocks of 16"),
        ({"mxfp": {"format": "fp8", "group_size": 16}}, "e4m3 numbers with real scales for blocks of 16"),
    ],
)
def test_what_no_scheme_can_say_is_refused(method: dict[str, Any], reason: str, tmp_path: Path) -> None:
    save_model("llama", tmp_path / "base")
    compress(tmp_path / "base", tmp_path / "out", [{"linear": method}])
    with pytest.raises(ValueError, match=rf"q_proj\.weight: it is {reason}.*--fold"):
        export_model(open_model(tmp_path / "out"), "compressed_tensors", tmp_path / "ct")


@torch.no_grad()
def test_pruned_floats_are_written_as_zeros(tmp_path: Path) -> None:
    save_model("llama", tmp_path / "base", intermediate_size=64)
    compress(tmp_path / "base", tmp_path / "floats", [{"linear": {"mxfp": {"format": "nvfp4"}}}])
    model = open_model(tmp_path / "floats")
    name = model.prefix(0) + model.block_slots[0].name
    weight = model.weight(name)
    kept = weight.unpack().abs() > 0.1
    tensors = _pack(name.removesuffix(".weight"), Masked.of(weight, kept))
    packed = tensors[name + "_packed"]
    halves = torch.stack([packed & 15, packed >> 4], dim=-1).reshape(weight.shape)
    assert bool((halves[~kept] == 0).all())
    assert isinstance(weight, FloatBlock)
    assert torch.equal(halves[kept], weight.unpack_codes()[kept])

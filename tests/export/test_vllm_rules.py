"""vLLM's rules: kernels, devices, and layers that are said to be no integers. vLLM itself is not run."""

import json
from pathlib import Path
from typing import Any

import pytest

import decoct
from decoct.exporters import MisfitError
from decoct.exporters.vllm_rules import Stored, check_for_vllm, is_quantized, kernel_problem, parallel_problem
from decoct.model import open_model
from tests.cli.test_commands import invoke
from tests.engine.running import make_base, run

SHAPE = {"hidden_size": 64, "intermediate_size": 192, "head_dim": 16, "num_hidden_layers": 1}


def stored(bits: int, size: int | None, *, symmetric: bool = True, number: str = "int", inputs: str = "") -> Stored:
    return Stored("m", "mlp.down", (64, 256), bits, size, symmetric, number, inputs)


KERNELS: list[tuple[str, Stored, str | None]] = [
    ("compressed_tensors", stored(4, 64), None),
    ("compressed_tensors", stored(8, -1), None),
    ("compressed_tensors", stored(4, 128, symmetric=False), None),
    ("compressed_tensors", stored(4, 16), "not in Marlin"),
    ("compressed_tensors", stored(8, 64, symmetric=False), "zero points with 4 bits only"),
    ("compressed_tensors", stored(3, 64), "humming"),
    ("compressed_tensors", stored(8, None), "a scale for each row or group"),
    ("compressed_tensors", stored(8, -1, inputs="int8"), None),
    ("compressed_tensors", stored(8, 64, inputs="int8"), "a scale a row, or one"),
    ("compressed_tensors", stored(4, 64, inputs="int8"), "some machines only"),
    ("compressed_tensors", stored(8, -1, number="float-quantized"), None),
    ("compressed_tensors", stored(6, 32, number="mxfp6-pack-quantized"), "no kernel"),
    ("compressed_tensors", stored(8, 32, number="mxfp8-quantized"), "rounds the inputs"),
    ("gptq", stored(4, 64), None),
    ("gptq", stored(8, -1), None),
    ("gptq", stored(3, 64), "4 and 8 symmetric bits only"),
    ("gptq", stored(4, 64, symmetric=False), "4 and 8 symmetric bits only"),
    ("gptq", stored(4, 256), "32, 64, 128 or a row only"),
    ("awq", stored(4, 64, symmetric=False), None),
    ("awq", stored(4, 16, symmetric=False), "not in Marlin"),
]


@pytest.mark.parametrize(("form", "each", "said"), KERNELS)
def test_kernels(form: str, each: Stored, said: str | None) -> None:
    problem = kernel_problem(form, each)
    assert problem is None if said is None else problem is not None and said in problem


def test_devices(tmp_path: Path) -> None:
    """4 heads, 2 of keys and values; down has 192 inputs: in groups of 32, 6 groups."""
    model = open_model(make_base(tmp_path, "llama", **SHAPE))
    down = Stored("down", "mlp.down", (64, 192), 4, 32, symmetric=True)
    assert parallel_problem(model, [down], 1) is None
    assert parallel_problem(model, [down], 2) is None
    assert parallel_problem(model, [down], 4) == "down: 48 input features a device are no whole groups of 32"
    assert parallel_problem(model, [down], 3) == "4 attention heads"
    row = Stored("down", "mlp.down", (64, 192), 4, -1, symmetric=True)
    assert parallel_problem(model, [row], 4) is None, "48 codes of 4 bits fill 6 words"
    assert parallel_problem(model, [Stored("k", "attn.k", (32, 64), 4, 32, symmetric=True)], 4) is None, "k is repeated"
    up = Stored("up", "mlp.up", (192, 64), 3, 32, symmetric=True, words=("in", "out"))
    assert parallel_problem(model, [up], 2) is None
    assert parallel_problem(model, [up], 4) == "up: 48 output features a device do not fill words of 32 bits"


@pytest.mark.parametrize("to", ["compressed_tensors", "gptq", "awq"])
def test_findings_are_in_the_report(to: str, tmp_path: Path) -> None:
    base = make_base(tmp_path, "llama-tied", **SHAPE)
    rules = [{"match": "attn.o", "leave": True}, {"match": "*", "rtn": {"group_size": 16}}]
    out = run(base, tmp_path / "out", {"linear": rules}).folder
    with pytest.raises(MisfitError, match=r"among 8 devices: 4 attention heads; use --tensor-parallel 4$"):
        decoct.export(out, to, tmp_path / to, load=False, tensor_parallel=8)
    assert not (tmp_path / to).exists()
    result = invoke("export", out, "--to", to, "-o", tmp_path / to, "--no-load", "--tensor-parallel", "4")
    assert result.exit_code == 0, result.output
    assert "vllm kernels: warning; 4-bit integers, " in result.stdout
    assert "vllm tensor parallel: ok; fits 1, 2, 4 devices; not 8: 4 attention heads" in result.stdout
    assert "vllm ignore list: ok; right of 8 layers" in result.stdout
    saved = {check["name"]: check for check in json.loads((tmp_path / to / "decoct-export.json").read_text())["checks"]}
    assert saved["vllm kernels"]["warning"]
    assert saved["vllm kernels"]["ok"] is None


def without(config: dict[str, Any], form: str) -> dict[str, Any]:
    """The config, with what it says of layers that are no integers taken out."""
    key: str = {"compressed_tensors": "ignore", "gptq": "dynamic", "awq": "modules_to_not_convert"}[form]
    return {**config, key: {} if form == "gptq" else []}


@pytest.mark.parametrize("to", ["compressed_tensors", "gptq", "awq"])
def test_a_layer_that_is_not_named_is_noticed(to: str, tmp_path: Path) -> None:
    base = make_base(tmp_path, "llama", **SHAPE)
    rules = [{"match": "attn.o", "leave": True}, {"match": "*", "rtn": {"group_size": 32}}]
    out = run(base, tmp_path / "out", {"linear": rules}).folder
    decoct.export(out, to, tmp_path / to, load=False)
    config = json.loads((tmp_path / to / "config.json").read_text())["quantization_config"]
    name = "model.layers.0.self_attn.o_proj"
    assert not is_quantized(to, config, name)
    assert is_quantized(to, config, "model.layers.0.self_attn.q_proj")
    model = open_model(out)
    held = [
        Stored(n, s.role, (64, 64), 4, 32, symmetric=True) for n, s in model.slots().items() if n in model.described
    ]
    *_, right = check_for_vllm(model, to, held, config)
    *_, wrong = check_for_vllm(model, to, held, without(config, to))
    assert right.ok
    assert not wrong.ok
    assert "o_proj" in wrong.detail


def test_only_vllms_formats_are_divided(tmp_path: Path) -> None:
    base = make_base(tmp_path, "llama", **SHAPE)
    with pytest.raises(ValueError, match=r"not dense; leave tensor-parallel out"):
        decoct.export(base, "dense", tmp_path / "dense", tensor_parallel=2)
    out = run(base, tmp_path / "out", {"linear": {"rtn": {"group_size": 32}}}).folder
    with pytest.raises(ValueError, match="must be 1 or more, not 0"):
        decoct.export(out, "awq", tmp_path / "awq", tensor_parallel=0)

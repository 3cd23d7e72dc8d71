"""GPTQ folders hold decoct's own integers, as a reader written from the format's description finds them."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import decoct
from decoct.exporters.gptq import plan_gptq
from decoct.model import open_model
from decoct.ops.grid import Grid
from decoct.ops.packing import pack_words, unpack_words
from decoct.store import FolderSource
from decoct.weights import GroupInt
from tests.engine.running import make_base, run
from tests.export.readers import gptq_matrix, read_folder

WIDE = {"hidden_size": 64, "intermediate_size": 192, "head_dim": 16, "num_hidden_layers": 2}
GRIDS: dict[str, dict[str, Any]] = {
    "2 bits": {"bits": 2, "group_size": 16},
    "3 bits": {"bits": 3, "group_size": 32},
    "4 bits": {"bits": 4, "group_size": 32},
    "8 bits": {"bits": 8, "group_size": 32},
    "a whole row": {"bits": 4, "group_size": "channel"},
    "one scale": {"bits": 8, "group_size": "tensor"},
    "groups of 96": {"bits": 4, "group_size": 96},
    "2 bits with zero points": {"bits": 2, "group_size": 16, "symmetric": False},
    "3 bits with zero points": {"bits": 3, "group_size": 32, "symmetric": False},
    "4 bits with zero points": {"bits": 4, "group_size": 32, "symmetric": False},
    "8 bits with zero points": {"bits": 8, "group_size": 32, "symmetric": False},
}


def compress(tmp_path: Path, *steps: dict[str, Any], dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
    base = make_base(tmp_path, "llama", dtype, **{**WIDE, **changes})
    return run(base, tmp_path / "out", *steps).folder


def config_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text())["quantization_config"])


def settings_of(config: dict[str, Any], module: str) -> dict[str, Any] | None:
    """What the format's rules say of a module; None: it is not quantized."""
    for pattern, changes in (config["dynamic"] or {}).items():
        if re.match(pattern[2:], module):
            return {**config, **changes} if pattern.startswith("+:") else None
    return config


def compare_all(out: Path, folder: Path) -> int:
    """Every matrix that the config says is quantized is the same to the last bit; gives how many there are."""
    model, tensors, config, count = open_model(out), read_folder(folder), config_of(folder), 0
    for name, slot in model.slots().items():
        stem = name.removesuffix(".weight")
        if slot.role in ("embed", "lm_head"):
            continue
        settings = settings_of(config, stem)
        assert (settings is None) == (name in tensors)
        if settings is None:
            continue
        groups = tensors[f"{stem}.scales"].shape[0]
        assert groups == 1 if settings["group_size"] == -1 else model.shape(name)[1] // settings["group_size"]
        theirs = gptq_matrix(tensors, stem, settings["bits"], config["checkpoint_format"])
        ours = model.weight(name).unpack(torch.float32).double().numpy()
        # One product of two numbers of at most 11 bits each: exact in float32 as in float64.
        assert np.array_equal(theirs, ours)
        count += 1
    return count


@pytest.mark.parametrize("what", GRIDS)
def test_integers_are_written_as_they_are(what: str, tmp_path: Path) -> None:
    grid = dict(GRIDS[what])
    match = "mlp.down" if grid["group_size"] == 96 else "*"
    out = compress(tmp_path, {"linear": {"match": match, "rtn": grid}}, num_hidden_layers=1)
    report = decoct.export(out, "gptq", tmp_path / "gptq")
    assert report.ok
    assert {"tensors", "exact values", "load"} < {check.name for check in report.checks}
    assert "largest relative error 0.0e+00" in report.checks[1].detail
    config = config_of(tmp_path / "gptq")
    symmetric = grid.get("symmetric", True)
    assert (config["quant_method"], config["bits"], config["sym"]) == ("gptq", grid["bits"], symmetric)
    assert config["checkpoint_format"] == ("gptq" if symmetric else "gptq_v2")
    assert json.loads((tmp_path / "gptq" / "quantize_config.json").read_text()) == config
    assert compare_all(out, tmp_path / "gptq") == (1 if match == "mlp.down" else 7)
    repeated = "groups of 96 are written as 32, scales repeated (1)"
    assert (repeated in report.notes) == (grid["group_size"] == 96)


def test_zero_points_of_0_are_mirrored_in_version_1(tmp_path: Path) -> None:
    """Version 1 stores zeros less one, so it has none of 0: such groups turn round, and so does their scale."""
    grid = {"bits": 4, "group_size": 16, "symmetric": False}
    base = make_base(tmp_path, "llama", **WIDE)
    tensors = FolderSource.read
    model = open_model(base)
    name = "model.layers.0.mlp.up_proj.weight"

    def positive(self: FolderSource, key: str) -> torch.Tensor:
        found = tensors(self, key)
        return found.abs() if key == name else found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FolderSource, "read", positive)
        out = run(base, tmp_path / "out", {"linear": {"rtn": grid}}).folder
    weight = open_model(out).weight(name)
    assert isinstance(weight, GroupInt)
    zero = weight.grid().zero
    assert zero is not None
    assert int((zero == 0).sum()) > 50
    assert model.num_blocks == 2
    assert decoct.export(out, "gptq:v1", tmp_path / "v1").ok
    assert config_of(tmp_path / "v1")["checkpoint_format"] == "gptq"
    assert compare_all(out, tmp_path / "v1") == 14
    assert float(read_folder(tmp_path / "v1")["model.layers.0.mlp.up_proj.scales"].min()) < 0


def test_negative_scales_survive(tmp_path: Path) -> None:
    """A symmetric grid that was searched for has some: readers multiply with them like with any other."""
    out = compress(tmp_path, {"linear": {"gptq": {"bits": 3, "group_size": 32}}})
    assert decoct.export(out, "gptq", tmp_path / "gptq").ok
    scales = read_folder(tmp_path / "gptq")["model.layers.0.mlp.up_proj.scales"]
    assert 0.1 < float((scales < 0).float().mean()) < 0.9
    assert config_of(tmp_path / "gptq")["checkpoint_format"] == "gptq"
    assert compare_all(out, tmp_path / "gptq") == 14


def test_matrices_may_differ(tmp_path: Path) -> None:
    """Bits and groups of their own, in all blocks or some, or left as they are: rules by name."""
    rules = [
        {"match": "mlp.down", "rtn": {"bits": 8, "group_size": 96}},
        {"match": "1.attn.q", "rtn": {"bits": 3, "group_size": 32}},
        {"match": "1.attn.k", "rtn": {"bits": 3, "group_size": 32}},
        {"match": "1.attn.v", "rtn": {"bits": 3, "group_size": 32}},
        {"match": "attn.o", "leave": True},
        {"match": "*", "rtn": {"bits": 4, "group_size": 32}},
    ]
    out = compress(tmp_path, {"linear": rules})
    assert decoct.export(out, "gptq", tmp_path / "gptq").ok
    config = config_of(tmp_path / "gptq")
    assert settings_of(config, "model.layers.0.self_attn.o_proj") is None
    assert settings_of(config, "model.layers.1.self_attn.qkv_proj") == settings_of(
        config, "model.layers.1.self_attn.q_proj"
    )
    assert [settings_of(config, f"model.layers.{i}.self_attn.q_proj")["bits"] for i in (0, 1)] == [4, 3]  # type: ignore[index]
    assert settings_of(config, "model.layers.1.mlp.down_proj")["bits"] == 8  # type: ignore[index]
    (modules,) = config["modules_in_block_to_quantize"]
    assert "self_attn.o_proj" not in modules
    assert len(modules) == 6
    assert compare_all(out, tmp_path / "gptq") == 12


def test_pruned_integers_stay_pruned(tmp_path: Path) -> None:
    out = compress(tmp_path, {"linear": {"wanda": {}}}, {"linear": {"rtn": {"bits": 4, "group_size": 32}}})
    assert decoct.export(out, "gptq", tmp_path / "gptq").ok
    assert compare_all(out, tmp_path / "gptq") == 14


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "5 bits": ({"rtn": {"bits": 5, "group_size": 32}}, "5-bit .* 2, 3, 4 or 8 bits; .* export as compressed_tensors"),
    "6 bits": ({"rtn": {"bits": 6, "group_size": 32}}, "6-bit integers, .* export as compressed_tensors, which"),
    "groups of 8": ({"rtn": {"group_size": 8}}, "know groups of 16, .* use a group_size .* compressed_tensors"),
    "real zero points": (
        {"hqq": {"group_size": 32}},
        "real zero .* zero: integer, export as gguf, which",
    ),
    "factors": ({"svd_llm": {"keep": 0.5}}, "a LowRank weight; .* export as dense, or add --fold"),
    "an embedding": ({"match": "embed", "rtn": {"group_size": 32}}, "a quantized embed, .* leave embed uncompressed"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_refused_by_name(what: str, tmp_path: Path) -> None:
    method, said = REFUSED[what]
    out = compress(tmp_path, {"linear": [method, {"match": "*", "rtn": {"group_size": 32}}]}, num_hidden_layers=1)
    with pytest.raises(ValueError, match=rf"GPTQ cannot hold model\.[a-z0-9_.]*\.weight: it is .*{said}") as caught:
        decoct.export(out, "gptq", tmp_path / "gptq")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "gptq").exists()


def test_folding_writes_the_rest(tmp_path: Path) -> None:
    rules = [{"match": ["embed", "mlp.down"], "rtn": {"bits": 5, "group_size": 32}},
             {"match": "*", "rtn": {"group_size": 32}}]  # fmt: skip
    out = compress(tmp_path, {"linear": rules}, {"linear": {"match": "attn.o", "inputs": {}}})
    with pytest.raises(ValueError, match=r"GPTQ cannot (say that the inputs|hold model\.embed)"):
        decoct.export(out, "gptq", tmp_path / "gptq")
    report = decoct.export(out, "gptq", tmp_path / "gptq", fold=True)
    assert report.ok
    assert report.notes[0].startswith("12 of 16 matrices hold decoct's own integers, 3 that were compressed")
    assert compare_all(out, tmp_path / "gptq") == 12
    with pytest.raises(ValueError, match="did you mean gptq:v"):
        decoct.export(out, "gptq:v3", tmp_path / "other")


def test_words_must_be_full(tmp_path: Path) -> None:
    base = make_base(tmp_path, "llama", **{**WIDE, "intermediate_size": 84})
    rtn = {"linear": {"match": "mlp.up", "rtn": {"group_size": 32}}}
    out = run(base, tmp_path / "out", rtn).folder
    with pytest.raises(ValueError, match=r"its 84 output features do not fill words of 32 bits; "):
        decoct.export(out, "gptq", tmp_path / "gptq")


def test_scales_that_float16_cannot_hold_are_refused(tmp_path: Path) -> None:
    out = compress(tmp_path, {"linear": {"rtn": {"group_size": 32}}})
    plan = plan_gptq(open_model(out), None, fold=False)
    weight = GroupInt.of(
        torch.zeros(192, 64, dtype=torch.uint8),
        Grid(torch.full((192, 2), 1e6, dtype=torch.bfloat16), None, 4, 32),
        torch.bfloat16,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(plan.model), "weight", lambda *_: weight)
        with pytest.raises(ValueError, match=r"up_proj\.weight has scales that float16 cannot hold"):
            plan.tensors("model.layers.0.mlp.up_proj.weight")


@pytest.mark.parametrize("bits", range(1, 9))
def test_words_and_back(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (5, 64), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    assert torch.equal(unpack_words(pack_words(codes, bits), bits), codes)
    if bits % 2:
        with pytest.raises(ValueError, match="do not fill whole words"):
            pack_words(codes[:, :16], bits)

"""MLX folders, by their schema and by a reader written from the format's description. MLX itself does not run here."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import decoct
from decoct.model import open_model
from tests.export.readers import mlx_matrix, read_folder
from tests.export.test_gptq import compress


def quantization_of(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config, "other readers would take it for theirs"
    found: dict[str, Any] = config["quantization"]
    assert found["mode"] == "affine"
    return found


def compare_all(out: Path, folder: Path, tolerance: float = 0.0) -> int:
    """Every matrix with scales is ours, every other is there as it is, and nothing else is."""
    model, tensors, quantization = open_model(out), read_folder(folder), quantization_of(folder)
    expected: set[str] = set()
    count = 0
    for name in model.slots():
        stem = name.removesuffix(".weight")
        expected.add(name)
        ours = model.weight(name).unpack(torch.float32).double().numpy()
        if f"{stem}.scales" not in tensors:
            assert tuple(tensors[name].shape) == ours.shape
            continue
        expected |= {f"{stem}.scales", f"{stem}.biases"}
        own = quantization.get(stem, quantization)
        bits, size = own["bits"], own["group_size"]
        rows, cols = ours.shape
        assert size in (32, 64, 128)
        assert bits in (2, 3, 4, 5, 6, 8)
        assert (tensors[name].dtype, tuple(tensors[name].shape)) == (torch.uint32, (rows, cols * bits // 32))
        for part in ("scales", "biases"):
            found = tensors[f"{stem}.{part}"]
            assert (found.dtype, tuple(found.shape)) == (model.dtype, (rows, cols // size))
        theirs = mlx_matrix(tensors, stem, bits, size)
        assert np.abs(theirs - ours).max() <= tolerance * np.abs(ours).max()
        count += 1
    for block in (None, *range(model.num_blocks)):
        expected |= set(model.others(block))
    assert tensors.keys() == expected
    return count


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_symmetric_integers_are_written_as_they_are(bits: int, tmp_path: Path) -> None:
    grid = {"bits": bits, "group_size": 32, "clip_search": True}
    out = compress(tmp_path, {"linear": {"match": ["embed", "lm_head", "*"], "rtn": grid}}, num_hidden_layers=1)
    report = decoct.export(out, "mlx", tmp_path / "mlx")
    assert report.ok
    assert {check.name: check.ok for check in report.checks} == {"tensors": True, "exact values": True, "load": None}
    assert quantization_of(tmp_path / "mlx") == {"group_size": 32, "bits": bits, "mode": "affine"}
    assert compare_all(out, tmp_path / "mlx") == 9
    if bits < 8:  # with 8 bits the grid spans the extremes
        assert float(read_folder(tmp_path / "mlx")["model.layers.0.mlp.up_proj.scales"].min()) < 0


def test_zero_points_become_biases(tmp_path: Path) -> None:
    """Their products with scales are exact in float32, and rounded where the model is in bfloat16."""
    grid = {"group_size": 32, "symmetric": False}
    for dtype, tolerance in ((torch.float32, 0.0), (torch.bfloat16, 2.0**-8)):
        folder = tmp_path / str(dtype)
        out = compress(folder, {"linear": {"rtn": grid}}, dtype=dtype, num_hidden_layers=1)
        report = decoct.export(out, "mlx", folder / "mlx")
        assert report.ok
        assert compare_all(out, folder / "mlx", tolerance) == 7
        (values,) = (check for check in report.checks if check.name == "values with rounded zero points")
        assert ("0.0e+00" in values.detail) == (tolerance == 0)
        assert ("rounded to torch.bfloat16" in " ".join(report.notes)) == (tolerance > 0)


def test_real_zero_points_and_groups_of_their_own(tmp_path: Path) -> None:
    rules = [
        {"match": "mlp.down", "rtn": {"bits": 6, "group_size": 192}},
        {"match": "attn.q", "hqq": {"group_size": 64}},
        {"match": "attn.o", "leave": True},
        {"match": "*", "rtn": {"group_size": 32}},
    ]
    out = compress(tmp_path, {"linear": rules}, dtype=torch.float32)
    report = decoct.export(out, "mlx", tmp_path / "mlx")
    assert report.ok
    assert "groups of 192 are written as 64, scales repeated (2)" in report.notes
    quantization = quantization_of(tmp_path / "mlx")
    assert quantization["model.layers.1.mlp.down_proj"] == {"group_size": 64, "bits": 6}
    assert quantization["model.layers.0.self_attn.q_proj"] == {"group_size": 64, "bits": 4}
    assert (quantization["group_size"], quantization["bits"]) == (32, 4)
    assert len(quantization) == 3 + 4
    assert compare_all(out, tmp_path / "mlx", 1e-6) == 12


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "7 bits": ({"bits": 7, "group_size": 32}, "7-bit integers, .* has 2, 3, 4, 5, 6 or 8 bits; .* compressed_tensors"),
    "groups of 16": ({"group_size": 16}, "in groups of 16, .* groups of 32, 64 or 128; .* export as gptq, which holds"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_refused_or_folded(what: str, tmp_path: Path) -> None:
    grid, said = REFUSED[what]
    rules = [{"match": "mlp.up", "rtn": grid}, {"match": "*", "rtn": {"group_size": 32}}]
    out = compress(tmp_path, {"linear": rules}, num_hidden_layers=1)
    with pytest.raises(ValueError, match=rf"MLX cannot hold .*up_proj\.weight: it is .*{said}"):
        decoct.export(out, "mlx", tmp_path / "mlx")
    assert decoct.export(out, "mlx", tmp_path / "mlx", fold=True).ok
    assert compare_all(out, tmp_path / "mlx") == 6

"""Quantization-aware training: what is rounded, that it is exact afterwards, that it learns, and what it refuses."""

from pathlib import Path
from typing import Any

import pytest
import torch

import decoct
from decoct.methods.quantize.qat import QAT
from decoct.model import open_model
from decoct.ops.grid import fit_grid, quantize
from decoct.recipe import RecipeError, build_method
from decoct.training.views.latent import latent_view
from decoct.weights import GroupInt, Weight, describe
from tests.engine.running import GPTQ, WANDA, Crash, Settings, digests, run, whole
from tests.training.test_distill import stop_after
from tests.weights.samples import samples

SHORT: Settings = {"num_steps": 4, "batch_size": 2, "sequence_length": 16, "group_size": 8}
FORMS = {
    "1": ({"bits": 1}, "Binary"),
    "1.58": ({"bits": 1.58}, "Ternary"),
    "1.58, absmean": ({"bits": 1.58, "grid": "absmean"}, "Ternary"),
    "2": ({"bits": 2}, "GroupInt"),
    "2, lsq": ({"bits": 2, "grid": "lsq"}, "GroupInt"),
    "3": ({"bits": 3}, "GroupInt"),
    "4": ({"bits": 4, "group_size": "channel"}, "GroupInt"),
}
ROUNDED = [name for name in samples() if any(k in name for k in ("dense", "group", "masked", "low", "ternary"))]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ROUNDED)
def test_what_training_sees_is_what_is_stored(name: str, form: str) -> None:
    """Also once latent weights and steps have moved; and twice the same."""
    weight: Weight = samples()[name]
    settings, _ = FORMS[form]
    view = latent_view(weight, QAT(**{**settings, "group_size": "channel"}))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter, unit in view.units():
            parameter.add_(0.2 * unit * torch.randn(parameter.shape, generator=generator))
    seen, back = view(torch.float32).detach(), view.weight()
    atol = 2 * torch.finfo(weight.dtype).eps * float(seen.abs().max())
    torch.testing.assert_close(seen, back.unpack(torch.float32), rtol=1e-3, atol=atol)
    again = latent_view(back, QAT(bits=2, group_size="channel")).weight()
    assert describe(again) == describe(back)
    torch.testing.assert_close(again.unpack(torch.float32), back.unpack(torch.float32), rtol=1e-3, atol=atol)


def test_negative_scales_stay_and_learn() -> None:
    w = torch.randn(6, 16, generator=torch.Generator().manual_seed(3)).abs()  # reaches further above zero
    grid = fit_grid(w, bits=2, group_size=8, scale_dtype=torch.bfloat16, search=True)
    weight = GroupInt.of(quantize(w, grid), grid, torch.float32)
    assert bool((grid.scale < 0).any())
    view = latent_view(weight, QAT(bits=2, group_size=8))
    torch.testing.assert_close(view(torch.float32).detach(), weight.unpack(), rtol=0, atol=0)
    torch.testing.assert_close(view.weight().unpack(), weight.unpack(), rtol=0, atol=0)
    with torch.no_grad():
        for parameter, unit in view.units():
            parameter.add_(0.1 * unit)
    view(torch.float32).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter, _ in view.units())
    torch.testing.assert_close(view.weight().unpack(), view(torch.float32).detach(), rtol=0, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_forms_are_those_of_the_plan(form: str, base: Path, tmp_path: Path) -> None:
    settings, kind = FORMS[form]
    stages = [{"qat": {**SHORT, **settings}}]
    data = {"source": str(base.parent / "text.txt"), "num_sequences": 4, "sequence_length": 16}
    planned = decoct.plan(base, {"stages": stages, "data": data})
    result = run(base, tmp_path / "out", stages=stages)
    made = open_model(result.folder)
    assert planned.result is not None
    # A plan counts rows that are filled to their last bit.
    assert {n: d.keys() for n, d in made.described.items()} == {
        n: d.keys() for n, d in planned.result.described.items()
    }
    assert {d["kind"] for d in made.described.values()} == {kind}
    assert len(made.described) == 3 * 7
    assert result.nbytes == pytest.approx(planned.output_bytes, rel=0.02)


def test_masks_are_kept_and_what_is_quantized_goes_on(base: Path, tmp_path: Path) -> None:
    pruned = open_model(run(base, tmp_path / "pruned", WANDA).folder)
    made = open_model(run(base, tmp_path / "out", stages=[{"blocks": [WANDA]}, {"qat": SHORT}]).folder)
    name = "model.layers.1.mlp.up_proj.weight"
    assert made.described[name]["kind"] == "Masked"
    assert bool((made.weight(name).unpack()[pruned.weight(name).unpack() == 0] == 0).all())
    four = open_model(run(base, tmp_path / "four", stages=[{"blocks": [GPTQ]}, {"qat": SHORT}]).folder)
    assert four.described[name]["bits"] == 4
    assert four.described == open_model(run(base, tmp_path / "gptq", GPTQ).folder).described


def test_a_stage_afterwards(base: Path, tmp_path: Path) -> None:
    """A low-rank term can be put beside what it leaves."""
    lora = {"num_steps": 2, "batch_size": 2, "sequence_length": 16, "train": ["lora"], "rank": 2}
    stages = [{"qat": {**SHORT, "bits": 3}}, {"distill": lora}]
    made = open_model(run(base, tmp_path / "out", stages=stages).folder)
    assert made.described["model.layers.1.mlp.up_proj.weight"]["kind"] == "Sum"
    assert [next(iter(entry["stage"])) for entry in made.lineage] == ["qat", "distill"]


@pytest.mark.parametrize("bits", [2, 1.58])
def test_a_real_model_learns(bits: float, stories: Path, story_text: Path, tmp_path: Path) -> None:
    """A few dozen steps, against rounding alone, on text that it was not trained on."""
    text = story_text.read_text(encoding="utf-8")
    (tmp_path / "train.txt").write_text(text[:-40_000], encoding="utf-8")
    (tmp_path / "test.txt").write_text(text[-30_000:], encoding="utf-8")
    data = {"source": str(tmp_path / "train.txt"), "num_sequences": 16, "sequence_length": 64}
    kl = {}
    for steps in (1, 40):
        settings = {"bits": bits, "group_size": 4, "num_steps": steps, "learning_rate": 0.005 if steps > 1 else 1e-9}
        decoct.compress(stories, {"data": data, "stages": [{"qat": settings}]}, tmp_path / str(steps))
        measure = {"text": tmp_path / "test.txt", "against": stories, "windows": 8, "length": 128}
        kl[steps] = decoct.evaluate(tmp_path / str(steps), **measure).kl_mean
    assert kl[40] is not None
    assert kl[40] < 0.6 * kl[1], kl


def test_stopped_it_goes_on(base: Path, tmp_path: Path) -> None:
    recipe: dict[str, Any] = {"stages": [{"qat": SHORT}]}
    for done in (2, 6):
        with pytest.raises(Crash):
            run(base, tmp_path / "out", watch=stop_after(done), **recipe)
    assert digests(run(base, tmp_path / "out", **recipe).folder) == whole(base, **recipe)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 5.5}, "bits must be 1, 1.58, or 2 to 8"),
        ({"bits": 1, "grid": "lsq"}, "grid lsq has too few levels"),
        ({"bits": 2, "grid": "absmean"}, "grid absmean is for bits: 1.58"),
        ({"group_size": "tensor"}, "group_size must be a number or channel"),
        ({"train": ["norms"]}, "put matrices into train"),
        ({"learning_rate": 2.0}, "learning_rate"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build_method("qat", settings, "stages[0]")


def test_groups_that_do_not_fit(base: Path) -> None:
    with pytest.raises(ValueError, match="group_size 20 does not divide 32 input features"):
        decoct.plan(base, {"stages": [{"qat": {**SHORT, "group_size": 20}}]})

"""Masks that are learned towards a shape: their distribution, that they get there, and what is left."""

from pathlib import Path
from typing import Any

import pytest
import torch

import decoct
from decoct.engine import find_masks
from decoct.engine.compress import compress_job
from decoct.engine.find_masks import Masking
from decoct.engine.job import Watch
from decoct.engine.narrow import NarrowModel
from decoct.engine.stream import Event
from decoct.methods.prune.sheared_llama import ShearedLLaMA
from decoct.model import open_model
from decoct.ops.hard_concrete import draw_mask, open_chance
from decoct.recipe import RecipeError, build_method
from tests.engine.running import Crash, digests, make_base, make_job


@pytest.mark.parametrize("logit", [-4.0, -1.0, 0.0, 2.0])
def test_masks_are_open_as_often_as_is_said(logit: float) -> None:
    """Against the formula in float64, and against many draws; gradients are those of finite differences."""
    chance = torch.linspace(0, 1, 200_002, dtype=torch.float64)[1:-1]
    logits = torch.full_like(chance, logit)
    soft = torch.sigmoid((torch.log(chance / (1 - chance)) + logit) * 1.5) * 1.2 - 0.1
    torch.testing.assert_close(draw_mask(logits, chance), soft.clamp(0, 1), rtol=1e-6, atol=1e-6)
    opened = float((draw_mask(logits, chance) > 0).double().mean())
    assert float(open_chance(torch.tensor(logit))) == pytest.approx(opened, abs=1e-3)
    few = chance[::20_000].clone()
    at = torch.full_like(few, logit).requires_grad_(True)
    draw_mask(at, few).sum().backward()
    up, down = (draw_mask(torch.full_like(few, logit + step), few) for step in (1e-6, -1e-6))
    assert at.grad is not None
    torch.testing.assert_close(at.grad, (up - down) / 2e-6, rtol=1e-4, atol=1e-6)


def learned(stories: Path, story_text: Path, folder: Path, **settings: Any) -> tuple[NarrowModel, Any, list[float]]:
    """Masks on a real model's neurons and heads, half of the latter to stay."""
    model = open_model(stories)
    data = {"num_sequences": 16, "sequence_length": 64, "source": str(story_text)}
    job = make_job(stories, folder, data=data, stages=[{"sheared_llama": settings}])
    from decoct.engine.data import load_tokens

    method = ShearedLLaMA(**settings)
    becomes, losses = NarrowModel.of(model, method), list[float]()
    tokens = load_tokens(job.data, model, print)

    def note(event: Event) -> None:
        assert event.loss is not None
        losses.append(event.loss)

    folder.mkdir()
    found = find_masks.find_masks(Masking(becomes, tokens, torch.float32, folder, note))
    return becomes, found, losses


SETTINGS = {"keep": 0.75, "keep_heads": 0.5, "multiple_of": 4, "num_steps": 120, "learning_rate": 0.2}


def test_the_shape_is_reached(stories: Path, story_text: Path, tmp_path: Path) -> None:
    """The expected number of open masks is that which stays, in every block; the loss stays finite."""
    becomes, found, losses = learned(stories, story_text, tmp_path / "masks", **SETTINGS)
    assert len(losses) == 120
    assert all(0 < loss < 20 for loss in losses)
    for each in found:
        for trunk, kept in becomes._narrowed():
            expected = float(open_chance(each[trunk.edge]).sum())
            assert expected == pytest.approx(kept, abs=max(0.6, 0.08 * trunk.num_units)), trunk.edge
    chosen = torch.stack([each["mlp_mid"] for each in found])
    assert float(chosen.std(1).min()) > 0.1, "units differ"


def test_a_plain_narrower_checkpoint(stories: Path, story_text: Path, tmp_path: Path) -> None:
    """Better than one whose neurons were chosen by their size alone, on text that nothing was learned from."""
    text = story_text.read_text(encoding="utf-8")
    (tmp_path / "train.txt").write_text(text[:-40_000], encoding="utf-8")
    (tmp_path / "test.txt").write_text(text[-30_000:], encoding="utf-8")
    data = {"source": str(tmp_path / "train.txt"), "num_sequences": 32, "sequence_length": 64}
    kl = {}
    for name, learning in (("sheared_llama", {"num_steps": 120, "learning_rate": 0.1}), ("magnitude_width", {})):
        stage = {name: {"keep": 0.8, "multiple_of": 4, "reconstruct": False, **learning}}
        decoct.compress(stories, {"data": data, "stages": [stage]}, tmp_path / name)
        made = open_model(tmp_path / name)
        assert not made.described
        assert made.num_parameters <= 0.8 * open_model(stories).num_parameters
        measured = decoct.evaluate(made, text=tmp_path / "test.txt", against=stories, windows=4, length=128)
        assert measured.kl_mean is not None
        kl[name] = measured.kl_mean
    assert kl["sheared_llama"] < 0.95 * kl["magnitude_width"], kl


def test_a_killed_run_gives_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base(tmp_path)
    stage = {"sheared_llama": {"keep": 0.8, "multiple_of": 4, "num_steps": 6}}
    whole = compress_job(make_job(base, tmp_path / "whole", stages=[stage]), Watch())
    monkeypatch.setattr(find_masks, "_SAVE_SECONDS", 0.0)
    left = 4

    def event(_: Event) -> None:
        nonlocal left
        left -= 1
        if not left:
            raise Crash

    with pytest.raises(Crash):
        compress_job(make_job(base, tmp_path / "out", stages=[stage]), Watch(event=event))
    steps: list[str] = []
    watch = Watch(event=lambda found: steps.append(found.part))
    again = compress_job(make_job(base, tmp_path / "out", stages=[stage]), watch)
    assert digests(again.folder) == digests(whole.folder)
    assert steps[0] == "step 4", "three steps were saved, the fourth had not been yet"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"uneven": True}, "set uneven: false"),
        ({"num_steps": 0}, "must be at least 1"),
        ({"warmup": 2.0}, "warmup a fraction"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build_method("sheared_llama", settings, "stages[0]")

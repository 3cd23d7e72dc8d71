"""A search for sparsities: the same questions as for bits, counted in weights that go, or in bytes."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("scipy", reason="searching is an extra: pip install 'decoct[search]'")

import torch

import decoct
from decoct.model import Model, open_model
from decoct.recipe import RecipeError
from decoct.search import Found
from decoct.weights import Masked, Sparse
from tests.engine.running import digests
from tests.search.test_search import tied

SEARCH = {"num_sequences": 2, "num_measured": 2, "generations": 2, "offspring": 4}


def recipe(base: Path, method: Any = None, stages: Any = (), **search: Any) -> dict[str, Any]:
    linear = {"sparsegpt": {}} if method is None else method
    return {
        "data": {"source": str(base.parent / "text.txt"), "num_sequences": 6, "sequence_length": 16},
        "stages": [{"blocks": [{"linear": linear}]}, *stages],
        "search": {**SEARCH, **search},
    }


def searched(base: Path, out: Path, value: dict[str, Any]) -> tuple[Found, Model]:
    found: list[Found] = []
    decoct.compress(base, value, out, on_found=found.append)
    return found[0], open_model(out)


def removed(made: Model, names: Any) -> float:
    weights = [made.weight(name) for name in names]
    assert all(isinstance(weight, Sparse | Masked) for weight in weights)
    zeros = sum(weight.unpack().numel() - int(weight.survivors().sum()) for weight in weights)  # type: ignore[attr-defined]
    return zeros / sum(weight.unpack().numel() for weight in weights)


@pytest.mark.parametrize("sparsity", [0.45, 0.6])
def test_so_many_weights_go_and_hardly_more(base: Path, tmp_path: Path, sparsity: float) -> None:
    found, made = searched(base, tmp_path / "out", recipe(base, sparsity=sparsity))
    assert found.setting == "sparsity"
    assert found.sparsity == pytest.approx(removed(made, found.choice))
    assert sparsity - 0.02 <= found.sparsity < sparsity + 0.03, "rows are short here"
    assert len(set(found.choice.values())) > 1
    for names in tied(found):
        assert len({found.choice[name] for name in names}) == 1
    for name, level in found.choice.items():
        assert removed(made, [name]) == pytest.approx(level, abs=0.04), "a row has few weights here"


def test_a_size_with_levels(base: Path, tmp_path: Path) -> None:
    size = open_model(base).nbytes * 3 // 4
    found, made = searched(base, tmp_path / "out", recipe(base, size=size, levels=[0.3, 0.5, 0.8]))
    assert set(found.choice.values()) <= {0.3, 0.5, 0.8}
    assert 0.9 * size < made.nbytes <= size


def test_the_recipe_that_is_found_gives_the_same_files(base: Path, tmp_path: Path) -> None:
    wanted = recipe(base, {"wanda": {}}, sparsity=0.5)
    decoct.compress(base, wanted, tmp_path / "one", write_recipe=tmp_path / "found.yaml")
    decoct.compress(base, tmp_path / "found.yaml", tmp_path / "two")
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


def test_joint_with_rounding(base: Path, tmp_path: Path) -> None:
    joint = {"sparsegpt": {"bits": 4, "group_size": 8}}
    found, made = searched(base, tmp_path / "out", recipe(base, joint, sparsity=0.5))
    kinds = {type(made.weight(name)) for name in found.choice}
    assert kinds == {Masked}
    assert removed(made, found.choice) == pytest.approx(0.5, abs=0.03)


def test_a_correction_does_not_hide_what_is_gone(base: Path, tmp_path: Path) -> None:
    steps = [{"linear": {"wanda": {}}}, {"linear": {"eora": {"rank": 2}}}]
    value = {**recipe(base, sparsity=0.5), "stages": [{"blocks": steps}]}
    found, _ = searched(base, tmp_path / "out", value)
    assert found.sparsity == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("sparsity", [0.9, 0.92])
def test_high_sparsities_can_be_met(base: Path, tmp_path: Path, sparsity: float) -> None:
    found, _ = searched(base, tmp_path / "out", recipe(base, {"wanda": {}}, sparsity=sparsity, generations=0))
    assert found.sparsity == pytest.approx(sparsity, abs=0.03)


def test_patterns_are_left_as_they_are(base: Path, tmp_path: Path) -> None:
    mixed = [{"match": "attn.*", "wanda": {"n": 2, "m": 4}}, {"match": "*", "wanda": {}}]
    found, made = searched(base, tmp_path / "out", recipe(base, mixed, sparsity=0.6, generations=0))
    assert all("mlp" in name for name in found.choice)
    attention = [name for name in made.described if "self_attn" in name]
    assert removed(made, attention) == 0.5
    assert removed(made, found.choice) == pytest.approx(0.6, abs=0.03)


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "nothing to choose": ({"gptq": {"group_size": 8}}, {"sparsity": 0.5}, "no method of this recipe has a sparsity"),
    "a pattern": ({"wanda": {"n": 2, "m": 4}}, {"sparsity": 0.5}, "no method of this recipe has a sparsity"),
    "owl": ({"wanda": {"owl": 0.08}}, {"sparsity": 0.5}, "owl divides a sparsity among blocks by a rule of its own"),
    "owl in some": (
        [{"match": "attn.*", "wanda": {}}, {"match": "*", "wanda": {"owl": 0.05}}],
        {"sparsity": 0.5},
        "owl divides a sparsity",
    ),
    "out of reach": (None, {"sparsity": 0.9, "levels": [0.5, 0.6]}, "0.9 cannot be met: with 0.6 everywhere"),
    "too little": (None, {"sparsity": 0.1, "levels": [0.5, 0.6]}, "0.1 cannot be met: with 0.5 everywhere"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_at_once(base: Path, tmp_path: Path, case: str) -> None:
    method, search, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        decoct.compress(base, recipe(base, method, **search), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({"sparsity": 1.2}, "'1.2' is no sparsity; give a fraction between 0 and 1"),
        ({"sparsity": 0.5, "levels": [0.5]}, "at least two different sparsities"),
        ({"sparsity": 0.5, "widths": [2, 3]}, "widths are bits to choose from, and here"),
        ({"bits": 3, "levels": [0.5, 0.6]}, "give a sparsity or a size"),
        ({"bits": 3, "sparsity": 0.5}, "give one of bits"),
    ],
)
def test_wrong_settings(base: Path, search: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        decoct.load_recipe(recipe(base, **search))


def test_plan(base: Path) -> None:
    planned = decoct.plan_search(base, recipe(base, sparsity=0.5))
    assert planned is not None
    search, alike = planned
    assert search.target.levels == (0.7, 0.6, 0.5, 0.4, 0.3)
    assert (search.wanted_sparsity, search.alike) == (0.5, 0.5)
    assert {m.sparsity for g in alike.stages[0].groups for m in g.methods} == {0.5}  # type: ignore[union-attr]


def test_better_than_all_alike(stories: Path, story_text: Path, tmp_path: Path) -> None:
    data = {"source": str(story_text), "num_sequences": 48, "sequence_length": 128}
    stages = [{"blocks": [{"linear": {"wanda": {"sparsity": 0.4}}}]}]
    decoct.compress(stories, {"data": data, "stages": stages}, tmp_path / "alike")
    search = {"sparsity": 0.4, "num_sequences": 8, "num_measured": 4, "generations": 3, "offspring": 8}
    chosen, made = searched(stories, tmp_path / "chosen", {"data": data, "stages": stages, "search": search})
    assert removed(made, chosen.choice) == pytest.approx(0.4, abs=0.02)
    kl = {
        name: decoct.evaluate(tmp_path / name, text=story_text, against=stories, windows=16, length=256).kl_mean
        for name in ("alike", "chosen")
    }
    assert kl["chosen"] < 0.9 * kl["alike"], kl
    assert torch.isfinite(torch.tensor(kl["chosen"]))

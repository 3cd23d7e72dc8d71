"""What a policy for keys and values learns by gradients; that it learns again when the model changes; old ones."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

import decoct
import decoct.hf  # registers the format
from decoct.engine import cache
from decoct.engine.data import text_tokens
from decoct.engine.job import Watch
from decoct.engine.runner import Runner
from decoct.engine.stages import RecipePlan, plan_stages
from decoct.engine.stream import Event
from decoct.evaluation import evaluate_model
from decoct.methods import Place
from decoct.methods.cache.kvquant import KVQuant
from decoct.methods.policy import describe_policy, read_policy
from decoct.model import open_model
from decoct.store import read_json, write_json
from tests.engine.running import RTN, Crash, Settings, digests, make_job, run
from tests.engine.test_plan import untouched

FP8: Settings = {"cache": {"fp8_cache": {}}}
KVQUANT: Settings = {"cache": {"kvquant": {"bits": 2, "group_size": 8}}}
UNIFORM: Settings = {"cache": {"kvquant": {"bits": 2, "group_size": 8, "levels": "uniform", "outliers": 0}}}


def planned(base: Path, stages: list[Settings], **changes: Any) -> RecipePlan:
    job = make_job(base, Path(), stages=stages, **changes)
    return plan_stages(job.model, job.stages, job.data, job.budget, None)


def stop_after_events(count: int) -> Watch:
    left = iter(range(count, -1, -1))

    def event(_: Event) -> None:
        if next(left) == 0:
            raise Crash

    return Watch(event=event)


def test_levels_are_learned_from_the_models_own_gradients(base: Path, tmp_path: Path) -> None:
    """The same keys, values and gradients, taken from transformers' model with autograd through all of it."""
    model = open_model(run(base, tmp_path / "out", stages=[{"blocks": [RTN]}, KVQUANT]).folder)
    policy = read_policy(model)
    assert policy is not None
    assert describe_policy(policy.method, policy.learned) == model.cache
    attentions = Runner(model, torch.float32).attentions()
    learners = [policy.method.learner(Place(i, None, each.frequencies)) for i, each in enumerate(attentions)]
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    class Spy(DynamicCache):  # type: ignore[misc]
        def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
            seen[layer_idx] = (keys, values)
            return keys, values

    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    tokens = text_tokens(str(base.parent / "text.txt"), model)[: 4 * 16].reshape(4, 16)
    for row, sequence in enumerate(tokens):
        inputs = reference.get_input_embeddings()(sequence.unsqueeze(0)).detach().requires_grad_()
        logits = reference(inputs_embeds=inputs, past_key_values=Spy()).logits[0]
        generator = torch.Generator().manual_seed(row)
        labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator).flatten()
        loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        flat = [tensor for block in range(3) for tensor in seen[block]]
        slopes = torch.autograd.grad(loss, flat)
        for block, learner in enumerate(learners):
            keys, values = (each.detach() for each in seen[block])
            learner.add(keys, values, (slopes[2 * block], slopes[2 * block + 1]))
    for mine, learner in zip(policy.learned, learners, strict=True):
        for name, levels in learner.learned().items():
            assert mine[name].shape == (4,)
            torch.testing.assert_close(mine[name], levels, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("events", "apart"), [(0, False), (2, False), (2, True), (3, False), (5, False)])
def test_resumed_it_gives_the_same_bits(
    events: int, apart: bool, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after lm_head's gradients, each block's, and the first shards; scratch inside the run or elsewhere."""
    changes: Settings = {"budget": {"scratch": str(tmp_path / "scratch")}} if apart else {}
    expected = digests(run(base, tmp_path / "whole", stages=[KVQUANT]).folder)
    with pytest.raises(Crash):
        run(base, tmp_path / "out", stages=[KVQUANT], watch=stop_after_events(events), **changes)
    found = []
    original = KVQuant.learner

    def learner(self: KVQuant, place: Place) -> Any:
        found.append(place.block)
        return original(self, place)

    monkeypatch.setattr(KVQuant, "learner", learner)
    assert digests(run(base, tmp_path / "out", stages=[KVQUANT], **changes).folder) == expected
    assert found == [2, 1, 0][max(0, min(events, 3)) :]
    assert not apart or not any((tmp_path / "scratch").iterdir())


def test_what_learning_takes_is_planned(base: Path) -> None:
    plain, (learned,), (scales,) = (
        planned(base, [UNIFORM]),
        planned(base, [KVQUANT]).stages,
        planned(base, [FP8]).stages,
    )
    assert not plain.needs_data
    assert learned.needs_data
    assert learned.scratch_bytes == (3 + 3) * 4 * 16 * open_model(base).config["hidden_size"] * 4
    assert scales.scratch_bytes == plain.stages[0].scratch_bytes == 0
    assert learned.seconds > scales.seconds
    with pytest.raises(ValueError, match=r"fill no group of 8 .* set data\.sequence_length=9 or more"):
        planned(base, [KVQUANT], data={"sequence_length": 8})
    planned(base, [KVQUANT], data={"sequence_length": 9})
    planned(base, [UNIFORM], data={"sequence_length": 8})


def test_a_policy_saved_before_it_had_levels_means_what_it_meant(base: Path, tmp_path: Path) -> None:
    out = run(base, tmp_path / "out", stages=[UNIFORM]).folder
    text = str(base.parent / "text.txt")
    expected = evaluate_model(open_model(out), text=text, against=open_model(base), windows=2, length=64)
    manifest = read_json(out / "decoct.json")
    assert manifest["cache"]["format_version"] == 2
    settings = {k: v for k, v in manifest["cache"]["policy"]["kvquant"].items() if k not in {"levels", "outliers"}}
    manifest["cache"] = {"format_version": 1, "policy": {"kvquant": settings}, "learned": []}
    write_json(out / "decoct.json", manifest)
    policy = read_policy(open_model(out))
    assert policy is not None
    assert policy.method == KVQuant(bits=2, group_size=8, levels="uniform", outliers=0)
    found = evaluate_model(open_model(out), text=text, against=open_model(base), windows=2, length=64)
    assert (found.kl_mean, found.cache_bits) == (expected.kl_mean, expected.cache_bits)
    assert found.cache_bits == 2 + 4


@pytest.mark.parametrize("policy", [FP8, KVQUANT])
def test_compressed_further_it_learns_again(policy: Settings, base: Path, tmp_path: Path) -> None:
    """As a recipe that ends in it would; what was learned of the model as it was is gone."""
    data = {"source": str(base.parent / "text.txt")}
    first = run(base, tmp_path / "first", stages=[policy]).folder
    assert [plan.kind for plan in planned(first, [{"blocks": [RTN]}], data=data).stages] == ["blocks", "cache"]
    said: list[str] = []
    second = run(first, tmp_path / "second", RTN, data=data, watch=Watch(message=said.append)).folder
    (name,) = policy["cache"]
    assert said == [f"{name} learns again at the end: what was saved with the model is of the weights as they were"]
    expected = open_model(run(base, tmp_path / "expected", stages=[{"blocks": [RTN]}, policy]).folder)
    found = open_model(second)
    assert found.cache == expected.cache != open_model(first).cache
    assert found.described == expected.described
    assert [list(entry["stage"]) for entry in found.lineage] == [["cache"], ["blocks"], ["cache"]]
    run(first, tmp_path / "second", RTN, data=data, watch=Watch(message=said.append))
    assert "holds the finished result of this command" in said[-1]


def test_learning_again_is_resumed(base: Path, tmp_path: Path) -> None:
    data = {"source": str(base.parent / "text.txt")}
    first = run(base, tmp_path / "first", stages=[FP8]).folder
    expected = digests(run(first, tmp_path / "whole", RTN, data=data).folder)
    with pytest.raises(Crash):
        run(first, tmp_path / "out", RTN, data=data, watch=stop_after_events(7))
    assert digests(run(first, tmp_path / "out", RTN, data=data).folder) == expected


def test_another_policy_of_the_recipe_comes_first(base: Path, tmp_path: Path) -> None:
    data = {"source": str(base.parent / "text.txt")}
    first = run(base, tmp_path / "first", stages=[FP8]).folder
    recipe = {"stages": [{"blocks": [RTN]}, UNIFORM], "data": data}
    assert [plan.kind for plan in decoct.plan(first, recipe).stages] == ["blocks", "cache"]
    policy = read_policy(open_model(decoct.compress(first, recipe, tmp_path / "out").folder))
    assert policy is not None
    assert isinstance(policy.method, KVQuant)


def test_a_text_that_is_missing_is_said_before_anything_runs(base: Path, tmp_path: Path) -> None:
    first = run(base, tmp_path / "first", stages=[FP8]).folder
    before = untouched(tmp_path)
    with pytest.raises(ValueError, match=r"nothing\.txt does not exist"):
        run(first, tmp_path / "out", RTN, data={"source": "nothing.txt"})
    assert untouched(tmp_path) == before


def test_what_learns_nothing_is_kept_without_a_text(base: Path, tmp_path: Path) -> None:
    first = run(base, tmp_path / "first", stages=[UNIFORM]).folder
    assert not planned(first, [{"blocks": [RTN]}], data={"source": "nothing.txt"}).needs_data
    second = open_model(run(first, tmp_path / "second", RTN, data={"source": "nothing.txt"}).folder)
    assert second.cache == open_model(first).cache


def test_damaged_keys_are_said(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = cache._Listener.last

    def damaged(self: Any) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = original(self)
        return keys * torch.inf, values

    monkeypatch.setattr(cache._Listener, "last", damaged)
    with pytest.raises(ValueError, match="not finite"):
        run(base, tmp_path / "out", stages=[FP8])

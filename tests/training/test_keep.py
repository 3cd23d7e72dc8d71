"""Keys and values rounded while training: what attention finds then, where gradients go, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

import decoct
from decoct.arch.hf import Attention
from decoct.engine.runner import Runner
from decoct.losses import CAKLD, Batch
from decoct.methods.cache.kivi import KIVI
from decoct.methods.heal.distill import Distill
from decoct.methods.policy import Policy
from decoct.model import Model, open_model
from decoct.recipe import parse_recipe, read_recipe
from decoct.runtime.cache import WholeWindow, places
from decoct.training.keep import StraightThrough, policy_of
from decoct.training.network import Student, Teacher
from decoct.training.objective import objective_of
from decoct.training.teachers import settled
from decoct.training.text import Text
from decoct.training.views.choose import vectors_of, views_of
from tests.engine.running import RTN, Settings, digests, make_base, run
from tests.tiny import save_model
from tests.training.test_student import EVERYTHING, TOKENS

COARSE = KIVI(bits=2, group_size=8, window=0)
SHORT: Settings = {"num_steps": 3, "batch_size": 2, "sequence_length": 16}
CACHE: Settings = {"kivi": {"bits": 2, "group_size": 8, "window": 0}}


def test_gradients_pass_straight_through() -> None:
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(2, 3, 12, 8, generator=generator) for _ in range(2))
    (place,) = places(Policy(COARSE), [Attention(None, None)])
    wanted = WholeWindow(COARSE, place).update(keys, values, 0)
    given = [each.clone().requires_grad_(True) for each in (keys, values)]
    found = StraightThrough(COARSE, place).update(*given, 0)
    assert found[0].shape[2] > keys.shape[2], "what is packed stands before what is not"
    for mine, theirs, tensor in zip(found, wanted, given, strict=True):
        torch.testing.assert_close(mine.detach(), theirs)
        slope = torch.randn(mine.shape, generator=generator)
        mine.backward(slope)
        packed = slope[:, :, : mine.shape[2] - 12]
        expected = slope[:, :, -12:].clone()
        expected[:, :, : packed.shape[2]] += packed
        torch.testing.assert_close(tensor.grad, expected)


@torch.no_grad()
def measured(model: Model, policy: Policy | None) -> float:
    """Cross-entropy as an evaluation with the policy has it."""
    runner = Runner(model, torch.float32)
    hidden = runner.embed(TOKENS, model.weight(model.family.embed).unpack())
    kept = None if policy is None else places(policy, runner.attentions())
    for block in range(model.num_blocks):
        laid = runner.lay_out(block, {n: model.weight(n) for n in model.slots() if n.startswith(model.prefix(block))})
        cache = None if kept is None or policy is None else WholeWindow(policy.method, kept[block])
        hidden = runner.run(block, laid, hidden, cache)
    logits = runner.logits(hidden, model.weight(model.end_slots[-1].name).unpack())
    return float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()))


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
def test_the_student_sees_what_is_measured(name: str, tmp_path: Path) -> None:
    """Its predictions are those of the model run with the policy; and they differ from those without."""
    save_model(name, tmp_path)
    model, found = open_model(tmp_path), {}
    for policy in (None, Policy(COARSE)):
        views, vectors = views_of(model, EVERYTHING), vectors_of(model, EVERYTHING)
        student = Student(model, views, vectors, torch.float32, recompute=True, policy=policy)
        loss = student(TOKENS, objective_of("cross_entropy"), None, Batch.of(TOKENS))
        loss.backward()
        assert loss.item() == pytest.approx(measured(model, policy), rel=1e-4)
        found[policy is None] = loss.item()
        keys = [view for key, view in student.views.items() if ".0." in key and ("k_proj" in key or "c_attn" in key)]
        gradient = keys[0].reals[0].grad
        assert gradient is not None
        assert float(gradient.abs().sum()) > 0
    assert found[True] != pytest.approx(found[False], rel=1e-4)


def test_in_a_stage(base: Path, tmp_path: Path) -> None:
    """The policy is trained with, and does not stay unless a stage says so; twice the same."""
    plain = run(base, tmp_path / "plain", stages=[{"qat": {**SHORT, "bits": 4, "group_size": 8}}])
    stages: list[Settings] = [{"qat": {**SHORT, "bits": 4, "group_size": 8, "cache": CACHE}}, {"cache": CACHE}]
    first = run(base, tmp_path / "out", stages=stages)
    assert first.losses[0] > plain.losses[0]
    assert digests(run(base, tmp_path / "again", stages=stages).folder) == digests(first.folder)
    made = open_model(first.folder)
    assert made.cache is not None
    own = policy_of(Distill(), made)
    assert own is not None
    assert own.method == KIVI(bits=2, group_size=8, window=0)
    healed = run(first.folder, tmp_path / "healed", stages=[{"distill": {**SHORT, "teacher": str(base)}}], data={
        "source": str(base.parent / "text.txt")
    })  # fmt: skip
    assert open_model(healed.folder).cache == made.cache


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cache": {"kiwi": {}}}, "cache: 'kiwi' is no policy for keys and values"),
        ({"cache": {"kivi": {"bits": 99}}}, "cache.kivi"),
        ({"cache": {"kvquant": {}}}, "kvquant learns from calibration first"),
        ({"cache": {}}, "cache names one policy"),
        ({"cache": CACHE, "loss": "attention_maps"}, "attention_maps compares attention to keys as they are"),
        ({"cache": {"kivi": {"group_size": 48}}}, "group_size"),
    ],
)
def test_what_is_refused(settings: Settings, message: str, base: Path) -> None:
    data = {"source": str(base.parent / "text.txt"), "num_sequences": 4, "sequence_length": 16}
    with pytest.raises(ValueError, match=message):
        decoct.plan(base, {"data": data, "stages": [{"distill": {**SHORT, **settings}}]})


def test_confidence_is_that_of_the_text(tmp_path: Path) -> None:
    """CAKLD's weight is the mean probability that the teacher gives to the text, found before the first step."""
    base = make_base(tmp_path)
    teacher = Teacher(open_model(base), torch.float32)
    text = Text(TOKENS.repeat(3, 1) % 60, torch.empty(0, 12, dtype=torch.long), 0)
    objective = settled(objective_of({"cakld": {"weight": 0.5}, "exits": {"each": "cakld"}}), teacher.seen, text, 2)
    logits = torch.log_softmax(decoct_logits(base, text.train), -1)
    chances = logits[:, :-1].exp().gather(-1, text.train[:, 1:, None])
    expected = float(chances.mean())
    found = [loss.confidence for loss in objective.predicting if isinstance(loss, CAKLD)]
    assert found == pytest.approx([expected] * 2, rel=1e-4)
    given = objective_of({"cakld": {"confidence": 0.25}})
    assert settled(given, teacher.seen, text, 2) == given
    assert run(base, tmp_path / "out", RTN, stages=[{"distill": {**SHORT, "loss": "cakld"}}]).losses[0] == 0


def decoct_logits(folder: Path, tokens: torch.Tensor) -> Any:
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(tokens).logits


def test_presets_hold_together() -> None:
    """LLM-QAT trains with the policy that it then saves, on text that the teacher writes."""
    recipe = parse_recipe(read_recipe("llm-qat"))
    (qat,) = recipe.stages[1].description.values()
    assert recipe.stages[2].description["cache"]["kivi"].items() >= qat["cache"]["kivi"].items()
    assert qat["data"] == "teacher"

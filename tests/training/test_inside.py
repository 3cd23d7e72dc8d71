"""Losses on inner states and at several exits in a stage: against transformers' own states, and in a whole run."""

from pathlib import Path
from typing import Any

import pytest
import torch

import decoct
from decoct.losses import AttentionMaps, Batch, Exits, HiddenStates, Relations
from decoct.model import open_model
from decoct.training.inside import Insides
from decoct.training.network import Student, Teacher
from decoct.training.objective import objective_of
from decoct.training.views.choose import vectors_of, views_of
from tests.engine.running import RTN, Crash, Settings, digests, make_base, run, whole
from tests.tiny import make_model, save_model
from tests.training.test_distill import stop_after
from tests.training.test_student import EVERYTHING, TOKENS

SHORT: Settings = {"num_steps": 3, "batch_size": 2, "sequence_length": 16}
LOSSES: dict[str, tuple[str, Any]] = {
    "states": ("llama", {"hidden_states": {"num_pairs": 2}}),
    "attention": ("llama", {"attention_maps": {"num_pairs": 3}}),
    "attention, gpt2": ("gpt2", {"attention_maps": {"num_pairs": 1}}),
    "relations": ("llama", {"relations": {"of": "keys", "num_heads": 2}}),
    "exits": ("llama", {"exits": {"num_exits": 2, "scale": 0.5}}),
    "all": ("llama", {"forward_kl": {"weight": 0.5}, "hidden_states": {"weight": 2.0}, "exits": {"weight": 0.25}}),
}


def different(name: str, folder: Path, **changes: Any) -> Any:
    other = make_model(name, **changes)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.3)
    other.save_pretrained(folder)
    return other


def student_of(folder: Path, teacher: Path, stated: Any, *, recompute: bool = True) -> tuple[Student, Teacher, Any]:
    objective, model, other = objective_of(stated), open_model(folder), open_model(teacher)
    insides = Insides(objective, model, other) if objective.inner else None
    views, vectors = views_of(model, EVERYTHING), vectors_of(model, EVERYTHING)
    student = Student(model, views, vectors, torch.float32, recompute=recompute, insides=insides)
    return student, Teacher(other, torch.float32, () if insides is None else insides.teacher_wants), objective


def expected(stated: Any, own: Any, other: Any) -> torch.Tensor:
    """The same from transformers' outputs of whole models."""
    weights = Batch.of(TOKENS).weights.reshape(TOKENS.shape)
    total = torch.zeros(())
    kl = [torch.log_softmax(model(TOKENS).logits[:, :-1], -1) for model in (other, own)]
    for name, settings in stated.items():
        given = {key: value for key, value in settings.items() if key != "weight"}
        own_states, other_states = (model(TOKENS, output_hidden_states=True).hidden_states for model in (own, other))
        match name:
            case "forward_kl":
                found = (kl[0].exp() * (kl[0] - kl[1])).sum(-1).mean()
            case "hidden_states":
                loss = HiddenStates(**given)
                # transformers' last state has passed the final norm; what the last block puts out has not.
                blocks = [last_output(model) for model in (own, other)]
                pairs = loss.pairs(3, 3)
                mine, theirs = (
                    [states[b + 1] if b < 2 else last for b, _ in pairs]
                    for states, last in zip((own_states, other_states), blocks, strict=True)
                )
                found = loss(mine, theirs, weights)
            case "exits":
                loss = Exits(**given)
                blocks = loss.blocks(3)
                norm, each = own.model.norm, []
                for block in blocks:
                    state = norm(own_states[block + 1]) if block < 2 else own_states[3]
                    predicted = torch.log_softmax(own.lm_head(state)[:, :-1], -1)
                    each.append(loss.weights(blocks)[block] * (kl[0].exp() * (kl[0] - predicted)).sum(-1).mean())
                found = sum(each)
            case "attention_maps":
                loss = AttentionMaps(**given)
                maps = [model(TOKENS, output_attentions=True).attentions for model in (own, other)]
                pairs = loss.pairs(3, 3)
                found = loss([maps[0][b] for b, _ in pairs], [maps[1][b] for b, _ in pairs], weights)
            case _:
                loss = Relations(**given)
                pairs = loss.pairs(3, 3)
                found = loss([keys_of(own, b) for b, _ in pairs], [keys_of(other, b) for b, _ in pairs], weights)
        total = total + settings.get("weight", 1.0) * found
    return total


def keys_of(model: Any, block: int) -> torch.Tensor:
    found = []
    hook = model.model.layers[block].self_attn.k_proj.register_forward_hook(lambda _, __, out: found.append(out))
    model(TOKENS)
    hook.remove()
    return found[0]


def last_output(model: Any) -> torch.Tensor:
    found = []
    hook = model.model.layers[-1].register_forward_hook(lambda _, __, out: found.append(out))
    model(TOKENS)
    hook.remove()
    return found[0][0] if isinstance(found[0], tuple) else found[0]


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("case", LOSSES)
def test_they_are_those_of_whole_models(case: str, recompute: bool, tmp_path: Path) -> None:
    name, stated = LOSSES[case]
    own, other = save_model(name, tmp_path / "student"), different(name, tmp_path / "teacher")
    student, teacher, objective = student_of(tmp_path / "student", tmp_path / "teacher", stated, recompute=recompute)
    found = student(TOKENS, objective, teacher.seen(TOKENS), Batch.of(TOKENS))
    for model in (own, other):
        model.set_attn_implementation("eager")
    for parameter in own.parameters():
        parameter.requires_grad_(True)
    wanted = expected(stated, own, other)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-3)
    assert found.item() > 1e-4
    found.backward()
    wanted.backward()
    mine = student.views[student.model.family.embed].reals[0].grad
    theirs = own.get_input_embeddings().weight.grad
    assert mine is not None
    torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-3 * float(theirs.abs().max()))


def test_widths_that_differ_are_learned_away(tmp_path: Path) -> None:
    base, big = make_base(tmp_path / "a"), make_base(tmp_path / "b", hidden_size=64, num_attention_heads=8)
    stated = {"forward_kl": {}, "hidden_states": {"num_pairs": 2}, "attention_maps": {"num_pairs": 2}}
    student, teacher, objective = student_of(base, big, stated)
    assert student.insides is not None
    assert [tuple(each.shape) for each in student.insides.parameters()] == [(64, 32)] * 2 + [(8, 4)] * 2
    student(TOKENS % 60, objective, teacher.seen(TOKENS % 60), Batch.of(TOKENS)).backward()
    assert all(each.grad is not None for each in student.insides.parameters())
    stages = [{"distill": {**SHORT, "teacher": str(big), "loss": stated}}]
    assert len(run(base, tmp_path / "out", stages=stages).losses) == 3


@pytest.mark.parametrize("loss", ["hidden_states", {"forward_kl": {}, "relations": {}, "exits": {"num_exits": 3}}])
def test_in_a_stage_and_going_on(loss: Any, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("decoct.training.loop._SAVE_SECONDS", 0.0)
    monkeypatch.setattr("decoct.training.loop._SAVE_SHARE", 0.0)
    recipe = {"stages": [{"blocks": [RTN]}, {"distill": {**SHORT, "loss": loss, "learning_rate": 0.02}}]}
    with pytest.raises(Crash):
        run(base, tmp_path / "out", watch=stop_after(2), **recipe)
    result = run(base, tmp_path / "out", **recipe)
    assert digests(result.folder) == whole(base, **recipe)
    assert result.losses[0] > 0


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path, "gpt2")
    data = {"source": str(tmp_path / "text.txt"), "num_sequences": 4, "sequence_length": 16}

    def plan(**settings: Any) -> None:
        decoct.plan(base, {"data": data, "stages": [{"distill": {**SHORT, **settings}}]})

    with pytest.raises(ValueError, match="computes queries, keys and values as one, so values cannot be compared"):
        plan(loss="relations")
    with pytest.raises(ValueError, match="losses on inner states need one teacher"):
        plan(loss="hidden_states", teacher=[str(base), str(base)])
    base = make_base(tmp_path / "llama")
    with pytest.raises(ValueError, match="num_heads 5 does not divide the 16 channels of the keys"):
        plan(loss={"relations": {"num_heads": 5, "of": "keys"}})

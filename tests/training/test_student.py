"""The student's forward pass is transformers' own; its loss and gradients are those of whole logits."""

from pathlib import Path

import pytest
import torch

from decoct.arch import attention
from decoct.losses import Batch
from decoct.methods.heal.distill import Distill
from decoct.model import open_model
from decoct.native.library import library
from decoct.training.network import Student, Teacher
from decoct.training.objective import objective_of
from decoct.training.views.choose import vectors_of, views_of
from tests.tiny import CONFIGS, make_model, save_model

TOKENS = torch.randint(96, (2, 12), generator=torch.Generator().manual_seed(3))
EVERYTHING = Distill(train=("matrices", "norms", "ends"))


def student_of(folder: Path, *, recompute: bool = True, method: Distill = EVERYTHING) -> Student:
    model = open_model(folder)
    return Student(model, views_of(model, method), vectors_of(model, method), torch.float32, recompute=recompute)


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradients_are_those_of_the_whole_model(name: str, tmp_path: Path) -> None:
    """KL from another model of the family, against transformers' logits of both, all in one piece."""
    theirs = save_model(name, tmp_path / "student")
    other = make_model(name)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.3)
    other.save_pretrained(tmp_path / "teacher")
    student = student_of(tmp_path / "student")
    taught = Teacher(open_model(tmp_path / "teacher"), torch.float32).seen(TOKENS)
    found = student(TOKENS, objective_of("forward_kl"), taught, Batch.of(TOKENS))
    found.backward()
    for parameter in theirs.parameters():
        parameter.requires_grad_(True)
    wanted = torch.log_softmax(other(TOKENS).logits[:, :-1].double(), -1)
    own = torch.log_softmax(theirs(TOKENS).logits[:, :-1].double(), -1)
    expected = (wanted.exp() * (wanted - own)).sum(-1).mean()
    expected.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    assert found.item() > 1e-3
    vectors = {student.model.family.module_name(key): vector for key, vector in student.vectors.items()}
    assert vectors
    for key, parameter in theirs.named_parameters():
        if key in vectors:
            gradient = vectors[key].values.grad
            assert gradient is not None, key
            atol = 1e-4 * float(parameter.grad.abs().max()) + 1e-8
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=atol)
    embed = student.views[student.model.family.embed].reals[0].grad
    theirs_embed = theirs.get_input_embeddings().weight.grad
    assert embed is not None
    atol = 1e-4 * float(theirs_embed.abs().max()) + 1e-8
    torch.testing.assert_close(embed, theirs_embed, rtol=1e-3, atol=atol)


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
def test_recomputing_changes_nothing(name: str, tmp_path: Path) -> None:
    save_model(name, tmp_path)
    gradients = []
    for recompute in (True, False):
        student = student_of(tmp_path, recompute=recompute)
        student(TOKENS, objective_of("cross_entropy"), None, Batch.of(TOKENS)).backward()
        gradients.append({key: p.grad for key, p in student.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][key], gradients[1][key]) for key in gradients[0])
    assert len(gradients[0]) > 20


def test_half_precision_is_close(tmp_path: Path) -> None:
    save_model("llama", tmp_path, torch.bfloat16)
    model, losses = open_model(tmp_path), []
    for dtype in (torch.float32, torch.bfloat16):
        student = Student(model, views_of(model, EVERYTHING), vectors_of(model, EVERYTHING), dtype, recompute=True)
        loss = student(TOKENS, objective_of("cross_entropy"), None, Batch.of(TOKENS))
        loss.backward()
        losses.append(loss.item())
        assert all(p.dtype == torch.float32 for p in student.parameters())
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_only_what_is_trained_has_parameters(tmp_path: Path) -> None:
    save_model("llama-tied", tmp_path)
    counts = {
        train: len(list(student_of(tmp_path, method=Distill(train=(train,))).parameters()))
        for train in ("matrices", "norms", "ends")
    }
    assert counts == {"matrices": 3 * 7, "norms": 3 * 2 + 1, "ends": 1}


def test_a_sum_of_losses() -> None:
    objective = objective_of({"forward_kl": {"weight": 0.75}, "cross_entropy": {"weight": 0.25}})
    assert [weight for weight, _ in objective.terms] == [0.75, 0.25]
    assert objective.needs_teacher
    assert not objective_of("cross_entropy").needs_teacher


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ("forward_lk", "unknown loss 'forward_lk'; did you mean 'forward_kl'"),
        ({"skew_kl": {"alhpa": 0.1}}, "loss skew_kl: unknown key 'alhpa'; did you mean 'alpha'"),
        ({"skew_kl": {"alpha": 3.0}}, "loss skew_kl: alpha must lie between 0 and 1"),
        ({"skew_kl": 3}, "loss skew_kl: expected settings"),
        ({}, "loss names nothing"),
        ({"exits": {"each": "hidden_states"}}, "loss exits: each is one loss on predictions"),
        ({"exits": {"num_exits": 0}}, "loss exits: num_exits must be at least 1"),
        ({"relations": {"of": "heads"}}, "loss relations: Input should be 'queries', 'keys' or 'values'"),
    ],
)
def test_wrong_losses(stated: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        objective_of(stated)  # type: ignore[arg-type]


@pytest.mark.skipif(library() is None, reason="decoct was installed without its compiled kernels")
def test_compiled_attention_serves_half_precision_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast leaves rotated queries and keys in float32, values in bfloat16; torch's attention casts them alike."""
    save_model("llama", tmp_path, torch.bfloat16)
    model, served = open_model(tmp_path), list[tuple[torch.dtype, ...]]()

    def spy(*given: torch.Tensor, scale: float) -> None:
        served.append(tuple(each.dtype for each in given))

    monkeypatch.setattr(attention, "attend", spy)
    student = Student(
        model, views_of(model, EVERYTHING), vectors_of(model, EVERYTHING), torch.bfloat16, recompute=False
    )
    student(TOKENS, objective_of("cross_entropy"), None, Batch.of(TOKENS))
    assert served == [(torch.bfloat16,) * 3] * model.num_blocks


def test_autocast_leaves_float64_alone() -> None:
    queries = torch.zeros(1, 2, 3, 4, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert {each.dtype for each in attention._autocast(queries, queries.float())} == {torch.float64, torch.float32}
        assert {each.dtype for each in attention._autocast(queries.float())} == {torch.bfloat16}

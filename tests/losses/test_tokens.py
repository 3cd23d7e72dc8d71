"""Losses on predictions: values against loops over formulas, gradients against finite differences, any chunks."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from decoct.losses import (
    CAKLD,
    JSD,
    LOSSES,
    ULD,
    Batch,
    CachedKL,
    CrossEntropy,
    Divergence,
    ForwardKL,
    Head,
    Logits,
    Mixed,
    MostConfident,
    Projected,
    SkewKL,
    SkewReverseKL,
    TokenLoss,
    compiled,
    confidence_of,
    describe,
    keep_top,
    label_log_probs,
)
from decoct.native.divergence import can_diverge, diverge
from tests.reference.losses import FORMULAS, rows, softmax, top_k_kl, uld

SETTINGS: dict[str, dict[str, float]] = {
    "jsd": {"beta": 0.3}, "skew_kl": {"alpha": 0.2}, "skew_reverse_kl": {"alpha": 0.2}, "cakld": {"confidence": 0.6},
}  # fmt: skip
SIZES = [1, 30, 1 << 20]  # entries at once: single ones, parts of the vocabulary, everything
TOKENS, VOCAB, WIDTH = 7, 13, 5

each_divergence = pytest.mark.parametrize("name", FORMULAS)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def student(seed: int = 0, **changes: Any) -> Projected:
    return Projected(draw(TOKENS, WIDTH, seed=seed), Head(draw(VOCAB, WIDTH, seed=seed + 50), **changes))


def batch() -> Batch:
    """Some rows are not taught, and the others do not weigh the same."""
    weights = torch.tensor([0.0, 0.1, 0.3, 0.0, 0.2, 0.25, 0.15], dtype=torch.float64)
    labels = torch.tensor([3, 0, 12, 5, 5, 1, 7])
    return Batch(labels, weights, torch.zeros(TOKENS, dtype=torch.long), torch.zeros(TOKENS, dtype=torch.bool))


def make(name: str, **more: float) -> Divergence:
    loss = LOSSES[name](**SETTINGS.get(name, {}), **more)
    assert isinstance(loss, Divergence)
    return loss


def logits_of(model: Projected) -> Tensor:
    return model.head.logits(model.hidden, slice(None))


@each_divergence
@pytest.mark.parametrize("at_once", SIZES)
def test_values_are_those_of_the_formulas(name: str, at_once: int) -> None:
    own, teacher, what = student(), student(1), batch()
    expected = [
        FORMULAS[name](softmax(t), softmax(s)) if weight else 0.0
        for t, s, weight in zip(rows(logits_of(teacher)), rows(logits_of(own)), what.weights, strict=True)
    ]
    loss = make(name)
    torch.testing.assert_close(loss.by_row(own, teacher, what, at_once), torch.tensor(expected, dtype=torch.float64))
    total = sum(e * float(w) for e, w in zip(expected, what.weights, strict=True))
    assert float(loss(own, teacher, what, at_once)) == pytest.approx(total, rel=1e-10)


def check_gradients(loss: TokenLoss, teacher: Any, at_once: int, **head: Any) -> None:
    """Against finite differences, by states, matrix and bias."""
    own, what = student(**head), batch()

    def value(hidden: Tensor, matrix: Tensor, bias: Tensor) -> Tensor:
        return loss(Projected(hidden, replace(own.head, matrix=matrix, bias=bias)), teacher, what, at_once)

    inputs = [own.hidden, own.head.matrix, 0.1 * draw(VOCAB, seed=9)]
    fast = at_once < TOKENS * VOCAB  # in one random direction; all directions where everything is one chunk
    assert torch.autograd.gradcheck(value, [each.clone().requires_grad_() for each in inputs], fast_mode=fast)


@each_divergence
@pytest.mark.parametrize("at_once", [30, 1 << 20])
def test_gradients(name: str, at_once: int) -> None:
    check_gradients(make(name), student(1), at_once)
    check_gradients(make(name, temperature=2.5), student(1), at_once, scale=0.7, softcap=3.0)


@pytest.mark.parametrize("at_once", [30, 1 << 20])
def test_gradients_of_the_others(at_once: int) -> None:
    check_gradients(CrossEntropy(), None, at_once)
    check_gradients(CachedKL(), keep_top(student(1), 4), at_once)
    check_gradients(ULD(weight=0.7), student(1), at_once)
    check_gradients(ForwardKL(), Mixed((student(1), student(2)), (1.0, 3.0)), at_once)


@pytest.mark.parametrize("at_once", SIZES)
def test_temperature_divides_logits_and_keeps_the_size_of_gradients(at_once: int) -> None:
    own, teacher, what = student(), student(1), batch()
    expected = sum(
        float(w) * 4 * FORMULAS["forward_kl"](softmax(t, 2.0), softmax(s, 2.0))
        for t, s, w in zip(rows(logits_of(teacher)), rows(logits_of(own)), what.weights, strict=True)
    )
    assert float(ForwardKL(temperature=2.0)(own, teacher, what, at_once)) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("at_once", SIZES)
def test_cross_entropy_and_probabilities_of_labels(at_once: int) -> None:
    own, what = student(), batch()
    exact = torch.log_softmax(logits_of(own), -1).gather(1, what.labels[:, None])[:, 0]
    torch.testing.assert_close(label_log_probs(own, what.labels, at_once), exact)
    assert float(CrossEntropy()(own, None, what, at_once)) == pytest.approx(-float((exact * what.weights).sum()))
    assert confidence_of(own, what) == pytest.approx(float((exact.exp() * what.weights).sum()))


@pytest.mark.parametrize("at_once", SIZES)
@pytest.mark.parametrize("k", [1, 4, VOCAB - 1])
def test_a_cached_teacher_is_exact_about_what_it_knows(k: int, at_once: int) -> None:
    own, teacher, what = student(), student(1), batch()
    kept = keep_top(teacher, k, at_once=20)
    found = CachedKL().by_row(own, kept, what, at_once)
    for row, (t, s) in enumerate(zip(rows(logits_of(teacher)), rows(logits_of(own)), strict=True)):
        p, q = softmax(t), softmax(s)
        known = sorted(range(VOCAB), key=lambda i: -p[i])[:k]
        assert sorted(kept.indices[row].tolist()) == sorted(known)
        if what.weights[row]:
            assert float(found[row]) == pytest.approx(top_k_kl(p, q, known), rel=1e-9)
            tail = [i for i in range(VOCAB) if i not in known]
            inner = [[each[i] / sum(each[j] for j in tail) for i in tail] for each in (p, q)]
            share = sum(p[i] for i in tail)
            whole = float(found[row]) + share * FORMULAS["forward_kl"](*inner)
            assert whole == pytest.approx(FORMULAS["forward_kl"](p, q), rel=1e-9), "the bias is the tail's own KL"


def test_a_student_that_equals_a_cached_teacher_is_left_alone() -> None:
    teacher, what = student(1), batch()
    own = Projected(teacher.hidden.clone().requires_grad_(), teacher.head)
    loss = CachedKL()(own, keep_top(teacher, 3), what)
    (gradient,) = torch.autograd.grad(loss, own.hidden)
    assert abs(float(loss.detach())) < 1e-12
    assert float(gradient.abs().max()) < 1e-12


@pytest.mark.parametrize("entries", [VOCAB - 4, VOCAB + 6])
def test_uld_compares_sorted_probabilities_of_any_vocabularies(entries: int) -> None:
    own, what = student(), batch()
    teacher = Projected(draw(TOKENS, WIDTH, seed=3), Head(draw(entries, WIDTH, seed=4)))
    found = ULD(weight=0.7).by_row(own, teacher, what, 40)
    for row, (t, s) in enumerate(zip(rows(logits_of(teacher)), rows(logits_of(own)), strict=True)):
        if what.weights[row]:
            assert float(found[row]) == pytest.approx(uld(softmax(t), softmax(s), int(what.labels[row]), 0.7), rel=1e-9)
    check_gradients(ULD(weight=0.7), teacher, 40)


@pytest.mark.parametrize("at_once", SIZES)
def test_several_teachers(at_once: int) -> None:
    own, first, second, what = student(), student(1), student(2), batch()
    p, q = (torch.softmax(logits_of(each), -1) for each in (first, second))
    mean = Logits((0.25 * p + 0.75 * q).log())
    loss = ForwardKL()
    found = loss(own, Mixed((first, second), (1.0, 3.0)), what, at_once)
    assert float(found) == pytest.approx(float(loss(own, mean, what)), rel=1e-10)
    sure = torch.where((p.amax(-1) >= q.amax(-1))[:, None], p, q)
    found = loss(own, MostConfident((first, second)), what, at_once)
    assert float(found) == pytest.approx(float(loss(own, Logits(sure.log()), what)), rel=1e-10)


def test_limits_meet() -> None:
    own, teacher, what = student(), student(1), batch()
    forward, reverse = (float(LOSSES[name]()(own, teacher, what)) for name in ("forward_kl", "reverse_kl"))
    assert float(JSD(beta=1e-6)(own, teacher, what)) / 1e-6 == pytest.approx(forward, rel=1e-3)
    assert float(JSD(beta=1 - 1e-6)(own, teacher, what)) / 1e-6 == pytest.approx(reverse, rel=1e-3)
    assert float(SkewKL(alpha=1e-9)(own, teacher, what)) == pytest.approx(forward, rel=1e-3)
    assert float(SkewReverseKL(alpha=1e-9)(own, teacher, what)) == pytest.approx(reverse, rel=1e-3)


def test_a_detached_mixture_changes_the_gradient_alone() -> None:
    own, teacher, what = student(), student(1), batch()
    hidden = own.hidden.clone().requires_grad_()
    loss = SkewReverseKL(alpha=0.3, detached=True)(Projected(hidden, own.head), teacher, what)
    (found,) = torch.autograd.grad(loss, hidden)
    lq = torch.log_softmax(hidden @ own.head.matrix.T, -1)
    lp = torch.log_softmax(logits_of(teacher), -1)
    mixture = (0.7 * lp.exp() + 0.3 * lq.exp().detach()).log()
    exact = ((lq.exp() * (lq - mixture)).sum(-1) * what.weights).sum()
    (expected,) = torch.autograd.grad(exact, hidden)
    assert float(loss.detach()) == pytest.approx(float(exact.detach()))
    torch.testing.assert_close(found, expected)


@each_divergence
def test_equal_models_are_left_alone(name: str) -> None:
    teacher, what = student(1), batch()
    own = Projected(teacher.hidden.clone().requires_grad_(), teacher.head)
    loss = make(name)(own, teacher, what)
    (gradient,) = torch.autograd.grad(loss, own.hidden)
    assert abs(float(loss.detach())) < 1e-12
    assert float(gradient.abs().max()) < 1e-12


@each_divergence
def test_tokens_that_are_ruled_out_do_no_harm(name: str) -> None:
    own, what = student(), batch()
    logits = logits_of(student(1))
    logits[:, 4] = -torch.inf
    hidden = own.hidden.clone().requires_grad_()
    loss = make(name)(Projected(hidden, own.head), Logits(logits), what)
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()


def test_rounded_models_get_gradients_in_their_own_dtype() -> None:
    own, teacher, what = student(), student(1), batch()
    exact = [own.hidden.bfloat16().double().requires_grad_(), own.head.matrix.bfloat16().double().requires_grad_()]
    given = [each.detach().bfloat16().requires_grad_() for each in exact]
    losses, found = [], []
    for hidden, matrix in (exact, given):
        loss = ForwardKL()(Projected(hidden, Head(matrix)), Logits(logits_of(teacher)), what, 30)
        losses.append(float(loss.detach()))
        found.append(torch.autograd.grad(loss, [hidden, matrix]))
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    for rounded, wanted in zip(found[1], found[0], strict=True):
        assert rounded.dtype == torch.bfloat16
        assert float((rounded.double() - wanted).norm() / wanted.norm()) < 0.03


def test_bad_input_is_refused() -> None:
    own, what = student(), batch()
    small = Projected(own.hidden, Head(own.head.matrix[:9]))
    for teacher, words in (
        (None, "needs a teacher"),
        (small, "9 entries, the student's 13"),
        (Logits(draw(3, VOCAB)), "predicts 3 tokens, the student 7"),
        (keep_top(own, 3), "cached_kl"),
    ):
        with pytest.raises(ValueError, match=words):
            ForwardKL()(own, teacher, what)
    with pytest.raises(ValueError, match="7 rows, the student predicts 6"):
        CrossEntropy()(Projected(own.hidden[:6], own.head), None, what)
    with pytest.raises(ValueError, match="cached logits"):
        CachedKL()(own, own, what)
    with pytest.raises(ValueError, match="not finite"):
        ForwardKL()(Projected(own.hidden * torch.nan, own.head), own, what)
    with pytest.raises(ValueError, match="k must be between 1 and 12"):
        keep_top(own, VOCAB)
    with pytest.raises(ValueError, match="share tokens and vocabulary"):
        Mixed((own, small), (1.0, 1.0))
    for wrong in ({"beta": 1.0}, {"temperature": 0.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            JSD(**wrong)
    with pytest.raises(ValueError, match="confidence"):
        CAKLD(confidence=0.0)


def test_a_batch_of_texts() -> None:
    tokens = torch.tensor([[5, 6, 7], [8, 9, 0]])
    what = Batch.of(tokens, torch.tensor([[True, True, True], [False, False, True]]), torch.tensor([False, True]))
    assert what.labels[[0, 1, 3, 4]].tolist() == [6, 7, 9, 0]
    torch.testing.assert_close(what.weights, torch.tensor([1, 1, 0, 0, 1, 0]) / 3)
    assert what.texts.tolist() == [0, 0, 0, 1, 1, 1]
    assert what.by_student.tolist() == [False, False, False, True, True, True]
    with pytest.raises(ValueError, match="no token"):
        Batch.of(tokens, torch.zeros(2, 3, dtype=torch.bool))


def test_every_loss_has_its_line() -> None:
    assert {cls.__module__.rsplit(".", 1)[1] for cls in LOSSES.values()} == set(LOSSES)
    assert len({describe(name) for name in LOSSES}) == len(LOSSES)


@pytest.mark.skipif(not can_diverge(torch.bfloat16, torch.device("cpu")), reason="torch computes losses here")
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jeffreys", "cakld", "cross_entropy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_say_what_torch_says(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss, rows' losses and gradients by states, head and bias, in several chunks, at a temperature and a scale."""
    loss = CrossEntropy() if name == "cross_entropy" else make(name, temperature=1.7)
    what = replace(batch(), weights=batch().weights.float())

    def found(at_once: int) -> list[Tensor]:
        hidden, matrix, bias = (each.to(dtype).requires_grad_() for each in (draw(TOKENS, 8), draw(40, 8), draw(40)))
        own = Projected(hidden, Head(matrix, bias=bias, scale=0.6))
        teacher = Projected(draw(TOKENS, 8, seed=1).to(dtype), Head(draw(40, 8, seed=2).to(dtype), scale=0.9))
        total = loss(own, teacher, what, at_once)
        gradients = torch.autograd.grad(total, (hidden, matrix, bias))
        return [total.detach(), loss.by_row(own, teacher, what, at_once), *gradients]

    calls: list[int] = []
    monkeypatch.setattr(compiled, "diverge", lambda *a, **k: calls.append(len(a[0])) or diverge(*a, **k))
    many, few = found(1 << 20), found(40)
    assert sum(calls) == 4 * int((what.weights != 0).sum())  # each row once for the total, once for the rows
    calls.clear()
    monkeypatch.setattr(compiled, "can_diverge", lambda *_: False)
    for wanted, *ours in zip(found(1 << 20), many, few, strict=True):
        for each in ours:
            close = 1e-5 if dtype == torch.float32 else 0.02
            torch.testing.assert_close(each, wanted, rtol=close, atol=close * float(wanted.abs().max()))
    assert not calls


def test_what_the_kernels_do_not_know_goes_the_general_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the kernels were asked")

    monkeypatch.setattr(compiled, "diverge", refuse)
    what = replace(batch(), weights=batch().weights.float())
    hidden, matrix = draw(TOKENS, 8).float(), draw(40, 8).float()
    own, wide = Projected(hidden, Head(matrix)), Projected(hidden, Head(matrix.bfloat16()))
    for student, teacher, at_once in [
        (Projected(hidden, Head(matrix, softcap=3.0)), own, 1 << 20),
        (Projected(hidden, Head(matrix, scale=-1.0)), own, 1 << 20),
        (Projected(hidden, Head(matrix.bfloat16(), bias=matrix[:, 0])), wide, 1 << 20),
        (own, wide, 1 << 20),
        (own, Mixed((own, own), (1.0, 1.0)), 1 << 20),
        (own, Logits(hidden @ matrix.T), 1 << 20),
        (own, own, 39),
    ]:
        assert torch.isfinite(ForwardKL()(student, teacher, what, at_once))
    assert torch.isfinite(SkewKL()(own, own, what))


def test_where_no_token_counts_the_loss_is_zero() -> None:
    what = replace(batch(), weights=torch.zeros(TOKENS))
    hidden = draw(TOKENS, 8).float().requires_grad_()
    own = Projected(hidden, Head(draw(40, 8).float()))
    total = CrossEntropy()(own, None, what)
    assert float(total.detach()) == 0
    assert float(torch.autograd.grad(total, hidden)[0].abs().max()) == 0
    assert float(CrossEntropy().by_row(own, None, what).abs().max()) == 0

"""Losses that look at whole texts, at several exits, or at what is inside: against the formulas in float64."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from decoct.losses import (
    AttentionMaps,
    Batch,
    DistiLLM2,
    Exits,
    ForwardKL,
    Head,
    HiddenStates,
    MiniLLM,
    Projected,
    Relations,
    StateLoss,
)
from tests.losses.test_tokens import VOCAB, WIDTH, draw
from tests.reference.losses import minillm_rewards

TEXTS, LENGTH = 4, 6


def models() -> tuple[Projected, Projected]:
    own, teacher = (
        Projected(draw(TEXTS * LENGTH, WIDTH, seed=s), Head(draw(VOCAB, WIDTH, seed=s + 9))) for s in (0, 1)
    )
    return Projected(own.hidden.requires_grad_(), own.head), teacher


def batch(by_student: list[bool]) -> Batch:
    """The texts' first two tokens are prompts; the second text ends early."""
    tokens = torch.randint(VOCAB, (TEXTS, LENGTH), generator=torch.Generator().manual_seed(5))
    taught = torch.ones(TEXTS, LENGTH, dtype=torch.bool)
    taught[:, :2] = False
    taught[1, 4:] = False
    found = Batch.of(tokens, taught, torch.tensor(by_student))
    return found.weighing(found.weights.double())


def log_probs(model: Projected) -> Tensor:
    return torch.log_softmax(model.hidden @ model.head.matrix.T, -1)


def compare(loss: Tensor, expected: Tensor, hidden: Tensor) -> None:
    torch.testing.assert_close(loss.detach(), expected.detach())
    compare_gradients(loss, expected, hidden)


def compare_gradients(loss: Tensor, expected: Tensor, hidden: Tensor) -> None:
    (found,), (wanted,) = torch.autograd.grad(loss, hidden), torch.autograd.grad(expected, hidden)
    assert float(wanted.abs().max()) > 1e-4
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("at_once", [30, 1 << 20])
@pytest.mark.parametrize("by_student", [[False, True, True, False], [False] * 4, [True] * 4])
def test_distillm2(by_student: list[bool], at_once: int) -> None:
    (own, teacher), what = models(), batch(by_student)
    lq, lp = log_probs(own), log_probs(teacher)
    apart: list[float] = []
    for text in range(TEXTS):
        rows = ((what.texts == text) & (what.weights > 0)).nonzero()[:, 0]
        q, p = (float(each.detach()[rows, what.labels[rows]].mean().exp()) for each in (lq, lp))
        apart.append(q - p if by_student[text] else p - q)
    expected = torch.zeros((), dtype=torch.float64)
    used = set()
    for text in range(TEXTS):
        kind = [d for d, own_text in zip(apart, by_student, strict=True) if own_text == by_student[text]]
        alpha = min(0.1, max(0.01, 1 - 0.9 * (sum(kind) / len(kind)) / (apart[text] + 1e-5)))
        used.add(alpha)
        for row in (what.texts == text).nonzero()[:, 0]:
            p, q = lp[row].exp(), lq[row].exp()
            if by_student[text]:
                term = 0.6 * (q * (lq[row] - ((1 - alpha) * p + alpha * q.detach()).log())).sum()
            else:
                term = 1.4 * (p * (lp[row] - (alpha * p + (1 - alpha) * q).log())).sum()
            expected = expected + what.weights[row] * term
    assert len(used) > 1, "texts have skews of their own"
    compare(DistiLLM2(student_share=0.3)(own, teacher, what, at_once), expected, own.hidden)


@pytest.mark.parametrize("share", [0.0, 0.2])
def test_minillm(share: float) -> None:
    (own, teacher), what = models(), batch([True] * 4)
    lq, lp = log_probs(own), log_probs(teacher)
    expected = torch.zeros((), dtype=torch.float64)
    for text in range(TEXTS):
        rows = ((what.texts == text) & (what.weights > 0)).nonzero()[:, 0].tolist()
        labels = [int(what.labels[row]) for row in rows]
        ratios = [float((lp - lq).detach()[row, label]) for row, label in zip(rows, labels, strict=True)]
        for row, label, reward in zip(rows, labels, minillm_rewards(ratios), strict=True):
            p, q = float(lp[row, label].exp()), float(lq[row, label].detach().exp())
            importance = q / (share * p + (1 - share) * q)
            single = (lq[row].exp() * (lq[row] - lp[row])).sum()
            expected = expected + what.weights[row] * importance * (single - reward * lq[row, label])
    compare(MiniLLM(teacher_share=share)(own, teacher, what, 30), expected, own.hidden)


def test_minillm_wants_texts_of_the_student() -> None:
    own, teacher = models()
    with pytest.raises(ValueError, match="texts that the student wrote"):
        MiniLLM()(own, teacher, batch([True, True, False, True]))


def test_the_policy_gradient_is_that_of_the_whole_texts_divergence() -> None:
    """Texts of two tokens, all of them: the mean gradient is that of the divergence of the texts' distributions."""
    size = 3
    first = draw(1, size).requires_grad_()
    second = draw(size, size, seed=1).requires_grad_()
    wanted = [torch.log_softmax(draw(*shape, seed=seed), -1) for seed, shape in ((2, (1, size)), (3, (size, size)))]

    def joint(a: Tensor, b: Tensor) -> Tensor:
        return torch.log_softmax(a, -1).T + torch.log_softmax(b, -1)

    lq, lp = joint(first, second), wanted[0].T + wanted[1]
    expected = torch.autograd.grad((lq.exp() * (lq - lp)).sum(), [first, second])
    total = torch.zeros((), dtype=torch.float64)
    eye = Head(torch.eye(size, dtype=torch.float64))
    for x in range(size):
        for y in range(size):
            own = Projected(torch.stack([first[0], second[x], first[0].detach()]), eye)
            teacher = Projected(torch.stack([wanted[0][0], wanted[1][x], wanted[0][0]]), eye)
            what = Batch.of(torch.tensor([[0, x, y]]), None, torch.tensor([True]))
            loss = MiniLLM(teacher_share=0.0)(own, teacher, what.weighing(what.weights.double() * 2))
            total = total + lq[x, y].detach().exp() * loss
    for found, exact in zip(torch.autograd.grad(total, [first, second]), expected, strict=True):
        torch.testing.assert_close(found, exact)


def test_exits() -> None:
    (own, teacher), what = models(), batch([False] * 4)
    early = Projected(draw(TEXTS * LENGTH, WIDTH, seed=7).requires_grad_(), own.head)
    loss = Exits(scale=0.5)
    weights = loss.weights([1, 3])
    assert weights == pytest.approx({1: 0.5 / 5, 3: 4.5 / 5})  # 0.5 · 1, and 3 + 0.5 · (1 + 2)
    each = {block: float(ForwardKL()(model, teacher, what).detach()) for block, model in ((1, early), (3, own))}
    found = loss({1: early, 3: own}, teacher, what)
    assert float(found.detach()) == pytest.approx(sum(weights[b] * each[b] for b in each))
    gradients = torch.autograd.grad(found, [early.hidden, own.hidden])
    assert all(float(gradient.abs().max()) > 0 for gradient in gradients)
    assert loss.weights([0]) == {0: 1.0}
    with pytest.raises(ValueError, match="no exits"):
        loss({}, teacher, what)


WEIGHTS = torch.tensor([[0.0, 0.5, 0.25], [0.25, 0.0, 0.0]])


def attention(*shape: int, seed: int) -> Tensor:
    return torch.softmax(draw(*shape, seed=seed).float(), -1)


def states(widths: tuple[int, int]) -> list[list[Tensor]]:
    return [[draw(2, 3, w, seed=s + n).float() for n in range(2)] for w, s in zip(widths, (0, 5), strict=True)]


@pytest.mark.parametrize("widths", [(4, 4), (4, 6), (6, 4)])
def test_hidden_states(widths: tuple[int, int]) -> None:
    own, teacher = states(widths)
    loss = HiddenStates(num_pairs=2)
    maps = {name: each.requires_grad_() for name, each in loss.maps(*widths, 2).items()}
    assert bool(maps) == (widths[0] != widths[1])
    found = loss(own, teacher, WEIGHTS, maps)
    expected = 0.0
    for pair in range(2):
        x, y = own[pair].double(), teacher[pair].double()
        if maps:
            x = torch.einsum("bsi,oi->bso", x, maps[str(pair)].detach().double())
        size = float(sum((y[b, s] ** 2).sum() for b in range(2) for s in range(3))) / 6
        expected += (
            sum(float(WEIGHTS[b, s] * ((x - y)[b, s] ** 2).sum()) / size for b in range(2) for s in range(3)) / 2
        )
    assert float(found.detach()) == pytest.approx(expected, rel=1e-5)
    learn(loss, own, teacher, maps)


def learn(loss: StateLoss, own: list[Tensor], teacher: list[Tensor], maps: dict[str, Tensor]) -> None:
    """Steps along the gradient, by states and maps, lower the loss."""
    trained = [each.clone().requires_grad_() for each in own] + list(maps.values())
    values = []
    for _ in range(8):
        now = loss(trained[:2], teacher, WEIGHTS, maps)
        values.append(float(now.detach()))
        gradients = torch.autograd.grad(now, trained)
        with torch.no_grad():
            for each, gradient in zip(trained, gradients, strict=True):
                each.sub_(0.05 * gradient)
    assert all(later < earlier for earlier, later in pairwise(values))


@pytest.mark.parametrize("heads", [(2, 2), (2, 3)])
def test_attention_maps(heads: tuple[int, int]) -> None:
    own, teacher = ([attention(2, h, 3, 3, seed=s + n) for n in range(2)] for h, s in zip(heads, (0, 5), strict=True))
    loss = AttentionMaps(num_pairs=2)
    maps = {name: each.requires_grad_() for name, each in loss.maps(*heads, 2).items()}
    expected = 0.0
    for pair in range(2):
        x, y = own[pair].double(), teacher[pair].double()
        if maps:
            x = torch.einsum("bhsk,oh->bosk", x, maps[str(pair)].detach().double())
        errors = [[float(((x - y)[b, :, s] ** 2).sum()) / heads[1] for s in range(3)] for b in range(2)]
        expected += float((torch.tensor(errors) * WEIGHTS).sum()) / 2
    assert float(loss(own, teacher, WEIGHTS, maps).detach()) == pytest.approx(expected, rel=1e-5)
    learn(loss, own, teacher, maps)


def test_relations_need_no_equal_widths() -> None:
    own, teacher = states((4, 8))
    loss = Relations(num_pairs=2, num_heads=2)
    assert loss.maps(4, 8, 2) == {}
    expected = 0.0
    for pair in range(2):
        for b in range(2):
            for s in range(3):
                for head in range(2):
                    both = []
                    for each, width in ((teacher[pair], 4), (own[pair], 2)):
                        x = each[b, : s + 1, head * width : (head + 1) * width].double()
                        both.append(torch.log_softmax(x @ x[s] / width**0.5, 0))
                    kl = float((both[0].exp() * (both[0] - both[1])).sum())
                    expected += float(WEIGHTS[b, s]) * kl / 2 / 2
    assert float(loss(own, teacher, WEIGHTS)) == pytest.approx(expected, rel=1e-4)
    learn(loss, own, teacher, {})


def test_pairs_are_spread_over_both_depths() -> None:
    assert HiddenStates(num_pairs=3).pairs(6, 12) == [(1, 3), (3, 7), (5, 11)]
    assert HiddenStates(num_pairs=4).pairs(2, 9) == [(0, 3), (1, 8)]


def test_states_that_do_not_fit_are_refused() -> None:
    own, teacher = states((4, 6))
    with pytest.raises(ValueError, match="give the maps"):
        HiddenStates()(own, teacher, WEIGHTS)
    with pytest.raises(ValueError, match="1 states of the student stand against 2"):
        HiddenStates()(own[:1], teacher, WEIGHTS)
    with pytest.raises(ValueError, match="does not divide the width 4"):
        Relations(num_heads=3)(own, own, WEIGHTS)
    with pytest.raises(ValueError, match="not finite"):
        HiddenStates()([own[0] * torch.nan], [own[0]], WEIGHTS)

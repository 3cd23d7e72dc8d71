"""Divergences and their gradients, by the kernels and by torch, against float64."""

import pytest
import torch
from torch import Tensor

from decoct.native.divergence import can_diverge
from decoct.ops.divergence import kl_and_slope, kl_of, surprise_and_slope, surprise_of


@pytest.fixture(params=["by kernels", "by torch"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "by kernels" and not can_diverge(torch.float32, torch.device("cpu")):
        pytest.skip("torch computes divergences here")
    if request.param == "by torch":
        monkeypatch.setattr("decoct.ops.divergence.can_diverge", lambda *_: False)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_divergence_and_its_gradient(dtype: torch.dtype) -> None:
    student, teacher = (3 * draw(7, 50, seed=seed).to(dtype) for seed in (1, 2))
    before = student.clone(), teacher.clone()
    loss, gradient = kl_and_slope(student, teacher)
    each = kl_of(student, teacher)
    exact = student.double().requires_grad_()
    own, wanted = torch.log_softmax(exact, -1), torch.log_softmax(teacher.double(), -1)
    expected = (wanted.exp() * (wanted - own)).sum(-1)
    (slope,) = torch.autograd.grad(expected.sum(), exact)
    assert loss == pytest.approx(float(expected.detach().sum()), rel=1e-5)
    torch.testing.assert_close(each, expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double(), slope, rtol=1e-4, atol=1e-6)
    assert gradient.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(student, before[0])
    assert torch.equal(teacher, before[1])


def test_equal_models_do_not_diverge() -> None:
    logits = draw(3, 20)
    loss, gradient = kl_and_slope(logits, logits.clone())
    assert loss == pytest.approx(0.0, abs=1e-6)
    assert float(gradient.abs().max()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_surprise(dtype: torch.dtype) -> None:
    logits, targets = draw(4, 33).to(dtype), torch.tensor([0, 32, 7, 7])
    wanted = -torch.log_softmax(logits.double(), -1)[torch.arange(4), targets]
    torch.testing.assert_close(surprise_of(logits, targets), wanted, rtol=1e-5, atol=1e-6)
    total, gradient = surprise_and_slope(logits, targets)
    assert total == pytest.approx(float(wanted.sum()), rel=1e-5)
    slope = torch.softmax(logits.double(), -1)
    slope[torch.arange(4), targets] -= 1
    torch.testing.assert_close(gradient.double(), slope, rtol=1e-4, atol=1e-6)


def test_what_is_ruled_out() -> None:
    base, own = draw(2, 9, seed=1), draw(2, 9, seed=2)
    base[0, 3], own[1, 4] = -torch.inf, -torch.inf
    found, (total, slope) = kl_of(own, base), kl_and_slope(own, base)
    p, q = base.double().softmax(-1), own.double().softmax(-1)
    rest = [0, 1, 2, 4, 5, 6, 7, 8]
    assert float(found[0]) == pytest.approx(float((p[0] * (p[0].log() - q[0].log()))[rest].sum()), rel=1e-5)
    assert float(found[1]) == pytest.approx(float(p[1, 4]) * 1e4, rel=0.01)  # as good as infinite
    assert total == pytest.approx(float(found.sum()), rel=1e-5)
    torch.testing.assert_close(slope.double(), q - p, rtol=1e-4, atol=1e-6)
    assert surprise_of(own, torch.tensor([0, 4])).isinf().tolist() == [False, True]


def test_any_strides_and_dtypes() -> None:
    base, own = draw(9, 6, seed=1).T, draw(9, 6, seed=2).T
    targets = torch.tensor([[1, 0], [2, 0], [8, 0], [0, 0], [1, 0], [3, 0]], dtype=torch.int32)[:, 0]
    torch.testing.assert_close(kl_of(own, base), kl_of(own.contiguous(), base.contiguous()))
    torch.testing.assert_close(kl_and_slope(own, base)[1], kl_and_slope(own.contiguous(), base.contiguous())[1])
    torch.testing.assert_close(
        surprise_of(own, targets.long()), surprise_of(own.contiguous(), targets.long().contiguous())
    )
    torch.testing.assert_close(kl_of(own.bfloat16(), base), kl_of(own.bfloat16().float(), base))
    assert float(surprise_and_slope(own, targets.long())[0]) == pytest.approx(
        float(surprise_of(own, targets.long()).sum()), rel=1e-6
    )

"""Divergences and their gradients, by the kernels and by torch, against float64."""

import pytest
import torch
from torch import Tensor

from decoct.ops.divergence import kl_and_slope, kl_of, surprise_of


@pytest.fixture(params=["as it is here", "by torch"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert gradient.dtype == torch.float32
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

"""Losses on predictions by the compiled kernels, at every instruction level, against float64."""

import pytest
import torch
from torch import Tensor

from decoct.native import divergence
from decoct.native.divergence import can_diverge, diverge
from decoct.native.library import library

FOUND = library()
LEVELS = FOUND.levels if FOUND else ()
pytestmark = pytest.mark.skipif(FOUND is None, reason="decoct was installed without its compiled kernels")
ENTRIES = [1, 15, 16, 100, 1024, 5001]
SHARES = [(1.0, 0.0), (0.0, 1.0), (0.3, 1.7)]


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = library()  # now: other tests have it loaded anew
    assert kernels is not None
    monkeypatch.setattr(kernels, "levels", (request.param,))
    monkeypatch.setattr(divergence, "FASTER", (request.param,))


def drawn(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return (3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def exact(
    student: Tensor, wanted: Tensor, scales: tuple[float, float], shares: tuple[float, float], weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Losses, and the gradient by the student's logits, in float64."""
    logits = student.double().requires_grad_()
    own = torch.log_softmax(logits * scales[0], -1)
    if wanted.dim() == 1:
        losses = -own.gather(1, wanted[:, None])[:, 0]
    else:
        theirs = torch.log_softmax(wanted.double() * scales[1], -1)
        losses = ((shares[1] * own.exp() - shares[0] * theirs.exp()) * (own - theirs)).sum(-1)
    (losses * weights).sum().backward()
    assert logits.grad is not None
    return losses.detach(), logits.grad


def check(student: Tensor, wanted: Tensor, scales: tuple[float, float], shares: tuple[float, float]) -> None:
    """Losses are right to single precision, gradients to the logits' own."""
    weights = torch.linspace(0.1, 2.0, len(student))
    losses, gradient = exact(student, wanted, scales, shares, weights)
    alone = diverge(student.clone(), wanted, scales=scales, shares=shares)
    found = student.clone()
    again = diverge(found, wanted, scales=scales, shares=shares, weights=weights)
    torch.testing.assert_close(alone, again, rtol=0, atol=0)
    torch.testing.assert_close(alone, losses, rtol=2e-6, atol=2e-6)
    eps = torch.finfo(student.dtype).eps
    close = max(eps * float(gradient.abs().max()), 3e-6)  # log-probabilities of 20 in single precision
    torch.testing.assert_close(found.double(), gradient, rtol=2 * eps, atol=close)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shares", SHARES)
def test_divergence_from_a_teacher(dtype: torch.dtype, shares: tuple[float, float]) -> None:
    assert can_diverge(dtype, torch.device("cpu"))
    for entries in ENTRIES:
        student, teacher = (drawn(5, entries, seed=k, dtype=dtype) for k in (0, 1))
        check(student, teacher, (1.0, 1.0), shares)
        check(student, teacher, (0.5, 0.25), shares)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cross_entropy(dtype: torch.dtype) -> None:
    for entries in ENTRIES:
        labels = torch.tensor([0, entries - 1, entries // 2, entries // 3, 0])
        check(drawn(5, entries, seed=0, dtype=dtype), labels, (0.7, 1.0), (1.0, 0.0))


@pytest.mark.usefixtures("level")
def test_what_is_ruled_out_and_what_is_no_number() -> None:
    student, teacher = (drawn(2, 40, seed=k, dtype=torch.float32) for k in (0, 1))
    student[:, 3:20], teacher[:, 3:20] = -torch.inf, -torch.inf
    known = [*range(3), *range(20, 40)]
    losses, gradient = exact(student[:, known], teacher[:, known], (1.0, 1.0), (1.0, 1.0), torch.ones(2))
    found = student.clone()
    torch.testing.assert_close(
        diverge(found, teacher, shares=(1.0, 1.0), weights=torch.ones(2)), losses, rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(found[:, known].double(), gradient, rtol=1e-5, atol=1e-6)
    assert float(found[:, 3:20].abs().max()) < 1e-30
    student[1, 7] = torch.nan
    found = diverge(student, teacher)
    assert torch.isfinite(found[0])
    assert torch.isnan(found[1])


def test_rows_of_nothing_and_none() -> None:
    assert diverge(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), weights=torch.zeros(0)).shape == (0,)
    assert torch.isnan(diverge(torch.full((1, 20), -torch.inf), torch.tensor([3]))).all()


def test_many_rows_on_all_threads() -> None:
    student, teacher = (drawn(50, 33, seed=k, dtype=torch.float32) for k in (0, 1))
    check(student, teacher, (1.0, 1.0), (1.0, 1.0))


LOGITS = torch.zeros(2, 4)
REFUSED = {
    "a label outside": (LOGITS, torch.tensor([0, 4]), None, "labels reach from 0 to 4"),
    "too few labels": (LOGITS, torch.tensor([0]), None, "2 rows need as many int64 labels"),
    "labels of another kind": (LOGITS, torch.tensor([0, 1], dtype=torch.int32), None, "int64 labels"),
    "too few weights": (LOGITS, torch.tensor([0, 1]), torch.ones(1), "2 rows need as many float32 weights"),
    "another vocabulary": (LOGITS, torch.zeros(2, 5), None, "the teacher's logits are"),
    "another dtype": (LOGITS, torch.zeros(2, 4).half(), None, "the teacher's logits are"),
    "no vocabulary": (torch.zeros(2, 0), torch.zeros(2, 0), None, "no logits that the kernels know"),
    "strides": (torch.zeros(4, 2).T, torch.tensor([0, 1]), None, "contiguous"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    student, wanted, weights, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        diverge(student, wanted, weights=weights)

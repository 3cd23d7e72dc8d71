"""Factors of damped Gram matrices."""

import pytest
import torch

from decoct.ops.linalg import damped_cholesky, inverse_factor, revived
from tests.reference.gptq import inverse
from tests.reference.inputs import correlated, hessian
from tests.reference.low_rank import cholesky


def damped(H: torch.Tensor, damping: float) -> torch.Tensor:
    return H + damping * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)


@pytest.mark.parametrize("n", [1, 2, 7, 24])
def test_upper_factor_of_the_damped_inverse(n: int) -> None:
    H = hessian(correlated(64, n))
    upper, used = inverse_factor(H, 0.01)
    assert used == 0.01
    assert torch.equal(upper, upper.triu())
    assert (upper.diagonal() > 0).all()
    expected = torch.tensor(inverse(damped(H, 0.01).tolist()), dtype=torch.float64)
    torch.testing.assert_close(upper.T @ upper, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(upper.T, torch.tensor(cholesky(expected.tolist()), dtype=torch.float64))


def test_float32_is_close_to_float64() -> None:
    H = hessian(correlated(64, 24))
    narrow, wide = inverse_factor(H.float(), 0.01).upper, inverse_factor(H, 0.01).upper
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.double(), wide, rtol=1e-3, atol=1e-4 * float(wide.abs().max()))


def test_dead_features_are_given_the_mean_of_live_ones() -> None:
    x = correlated(64, 8)
    x[:, [0, 3]] = 0
    H = hessian(x)
    found = revived(H)
    live = [1, 2, 4, 5, 6, 7]
    assert found.diagonal()[[0, 3]].tolist() == [float(H.diagonal()[live].mean())] * 2
    found.diagonal()[[0, 3]] = 0.0
    assert torch.equal(found, H)
    assert torch.equal(revived(torch.zeros(3, 3)), torch.eye(3))


def test_input_is_not_changed() -> None:
    H = hessian(correlated(64, 8))
    before = H.clone()
    inverse_factor(H, 0.01)
    damped_cholesky(H, 0.01)
    assert torch.equal(H, before)


def test_damping_grows_until_a_singular_matrix_factors() -> None:
    x = correlated(4, 24)  # fewer tokens than features
    H = hessian(x).float()
    H -= 1e-3 * H.diagonal().mean() * torch.eye(24)  # and rounding left it indefinite
    lower, used = damped_cholesky(H, 1e-5)
    assert used > 1e-5
    torch.testing.assert_close(lower @ lower.T, damped(H, used), rtol=1e-4, atol=1e-4)
    assert inverse_factor(H, 1e-5).damping > 1e-5
    assert damped_cholesky(hessian(x), 0.0)[1] >= 0.0


def test_no_damping_helps_a_matrix_that_is_far_from_positive() -> None:
    H = torch.eye(3)
    H[0, 1] = H[1, 0] = 1e9
    with pytest.raises(ValueError, match="not positive definite even with damping"):
        damped_cholesky(H, 0.01)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [(0, 0), (1, 2)])
def test_statistics_that_are_not_finite_are_refused(bad: float, place: tuple[int, int]) -> None:
    H = hessian(correlated(64, 8))
    H[place] = H[place[::-1]] = bad
    with pytest.raises(ValueError, match="input statistics"):
        inverse_factor(H, 0.01)


def test_statistics_of_zero_still_factor() -> None:
    lower, _ = damped_cholesky(torch.zeros(3, 3), 0.01)
    assert torch.isfinite(lower).all()

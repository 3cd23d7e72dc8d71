"""Factors of channels against the least-squares problem written out."""

import pytest
import torch
from torch import Tensor

from decoct.ops.channel_gain import channel_gains
from tests.reference.inputs import correlated, gaussian

WIDTH, TOKENS = 12, 80


def problem(seed: int) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """Readers as they became and as they were, inputs as they became and as they were."""
    was = [gaussian(7, WIDTH, seed=seed), gaussian(3, WIDTH, seed=seed + 1)]
    became = [w * (w.abs() > 0.6) for w in was]
    y = correlated(TOKENS, WIDTH)
    return became, was, y + 0.2 * gaussian(TOKENS, WIDTH, seed=seed + 2), y


def written_out(became: list[Tensor], was: list[Tensor], x: Tensor, y: Tensor, damping: float) -> Tensor:
    """One equation for each token and output, the unknowns the factors; and one that holds each factor at 1."""
    rows, targets = [], []
    for reader, before in zip(became, was, strict=True):
        for token in range(len(x)):
            for out in range(len(reader)):
                rows.append([float(reader[out, c]) * float(x[token, c]) for c in range(WIDTH)])
                targets.append(sum(float(before[out, c]) * float(y[token, c]) for c in range(WIDTH)))
    A, b = torch.tensor(rows, dtype=torch.float64), torch.tensor(targets, dtype=torch.float64)
    ridge = (damping * A.square().sum(0).mean()).sqrt()
    A = torch.cat([A, ridge * torch.eye(WIDTH, dtype=torch.float64)])
    b = torch.cat([b, ridge * torch.ones(WIDTH, dtype=torch.float64)])
    return torch.linalg.lstsq(A, b.unsqueeze(1)).solution[:, 0]


@pytest.mark.parametrize("seed", [1, 5])
@pytest.mark.parametrize("damping", [1e-6, 0.1])
def test_they_solve_the_problem_written_out(seed: int, damping: float) -> None:
    became, was, x, y = problem(seed)
    found = channel_gains(became, was, x.T @ x, y.T @ x, damping)
    torch.testing.assert_close(found.double(), written_out(became, was, x, y, damping), rtol=1e-3, atol=1e-3)


def test_what_has_not_changed_keeps_its_gain() -> None:
    _, was, _, y = problem(2)
    torch.testing.assert_close(channel_gains(was, was, y.T @ y, y.T @ y, 0.01), torch.ones(WIDTH))


def test_a_channel_that_is_never_read_keeps_its_gain() -> None:
    became, was, x, y = problem(3)
    became[0][:, 4] = became[1][:, 4] = 0
    assert float(channel_gains(became, was, x.T @ x, y.T @ x, 0.01)[4]) == pytest.approx(1, abs=1e-6)


def test_damaged_statistics_are_named() -> None:
    became, was, x, y = problem(4)
    x[3, 2] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        channel_gains(became, was, x.T @ x, y.T @ x, 0.01)

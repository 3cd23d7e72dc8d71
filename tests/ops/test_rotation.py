"""Turns are orthogonal, spread outliers, keep means where they must; Cayley steps stay orthogonal and go down."""

from itertools import pairwise

import pytest
import torch

from decoct.ops.cayley import cayley_step
from decoct.ops.rotation import Turn
from tests.reference.inputs import gaussian
from tests.reference.rotation import cayley, randomised_hadamard

WIDTHS = [1, 2, 8, 12, 36, 45, 64]


def orthogonal(n: int, seed: int = 0) -> torch.Tensor:
    return torch.linalg.qr(gaussian(n, n, seed=seed).double()).Q


@pytest.mark.parametrize("n", WIDTHS)
def test_a_random_turn_is_a_hadamard_transform_after_signs(n: int) -> None:
    torch.testing.assert_close(Turn.random(n, 5).dense(), randomised_hadamard(n, 5))


@pytest.mark.parametrize("n", WIDTHS)
@pytest.mark.parametrize("keeps_mean", [False, True])
def test_a_turn_is_orthogonal(n: int, keeps_mean: bool) -> None:
    q = Turn.random(n, 3, keeps_mean=keeps_mean).dense()
    torch.testing.assert_close(q @ q.T, torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize("n", WIDTHS)
def test_ones_stay_where_they_are_if_means_are_kept(n: int) -> None:
    turn = Turn.random(n, 3, keeps_mean=True)
    torch.testing.assert_close(turn(torch.ones(2, n, dtype=torch.float64)), torch.ones(2, n, dtype=torch.float64))
    x = gaussian(4, n, seed=1).double()
    torch.testing.assert_close(turn(x - x.mean(-1, keepdim=True)).mean(-1), torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize("keeps_mean", [False, True])
def test_an_outlying_channel_is_spread(keeps_mean: bool) -> None:
    x = torch.zeros(1, 64, dtype=torch.float64)
    x[0, 7] = 1.0
    assert float(Turn.random(64, 3, keeps_mean=keeps_mean)(x).abs().max()) < 0.3


@pytest.mark.parametrize("turn", [Turn.random(12, 3), Turn.random(12, 3, keeps_mean=True), Turn(matrix=orthogonal(12))])
def test_rows_and_columns(turn: Turn) -> None:
    q, w, factor = turn.dense(), gaussian(12, 12, seed=2), gaussian(12, seed=3)
    torch.testing.assert_close(turn.rows(w, factor=factor), (w.double() * factor @ q.T).float())
    torch.testing.assert_close(turn.columns(w), (q @ w.double()).float())
    middle = torch.eye(12, dtype=torch.float64) - 1 / 12
    torch.testing.assert_close(turn.rows(w, centre=True), (w.double() @ middle @ q.T).float())
    torch.testing.assert_close(turn.columns(w, centre=True, dtype=torch.float64), q @ middle @ w.double())


def test_large_matrices_are_turned_piece_by_piece() -> None:
    turn, w = Turn.random(1024, 1), gaussian(1500, 1024, seed=4)
    torch.testing.assert_close(turn.rows(w), turn(w.double()).float())
    torch.testing.assert_close(turn.columns(w.T), turn(w.double()).T.float())


def test_a_cayley_step_is_the_papers() -> None:
    q, gradient = orthogonal(9), gaussian(9, 9, seed=1) * 0.05
    found, step = cayley_step(q, gradient, 0.3)
    assert step == 0.3
    torch.testing.assert_close(found, cayley(q, gradient, 0.3))


def test_large_gradients_are_stepped_less_far() -> None:
    q, gradient = orthogonal(9), gaussian(9, 9, seed=1) * 100
    found, step = cayley_step(q, gradient, 1.5)
    assert step < 0.05
    torch.testing.assert_close(found, cayley(q, gradient, step))
    assert cayley_step(q, torch.zeros(9, 9), 1.5)[1] == 0.0


def test_a_hundred_steps_stay_orthogonal_and_reach_the_nearest_rotation() -> None:
    """The loss -trace(targetᵀ·Q) has its minimum, -n, where Q is the target."""
    target = orthogonal(16, seed=8)
    q = target @ torch.matrix_exp(0.5 * (gaussian(16, 16, seed=9) - gaussian(16, 16, seed=9).T).double() / 4)
    losses = []
    for _ in range(100):
        losses.append(-float((target * q).sum()))
        q, _ = cayley_step(q, -target, 1.5)
    assert float((q @ q.T - torch.eye(16, dtype=torch.float64)).abs().max()) < 1e-6
    assert losses[0] > -14
    assert -float((target * q).sum()) < -15.999
    assert all(later <= sooner + 1e-9 for sooner, later in pairwise(losses))

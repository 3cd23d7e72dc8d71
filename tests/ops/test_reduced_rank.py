"""The best low-rank map against alternating least squares on the data, and against the full map."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from decoct.ops.reduced_rank import reduced_rank_ridge, ridge
from tests.reference import reduced_rank as reference
from tests.reference.inputs import correlated, gaussian

SHAPES = [(6, 10), (10, 6), (8, 8)]  # out, in
DAMPING = 0.01


def problem(shape: tuple[int, int], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """Inputs, targets, their sums, and the ridge that the damping stands for."""
    out, width = shape
    inputs = correlated(60, width).to(dtype)
    targets = inputs @ gaussian(width, out, seed=3).to(dtype) + 0.5 * gaussian(60, out, seed=4).to(dtype)
    gram, cross = inputs.T @ inputs, targets.T @ inputs
    return inputs, targets, gram, cross, DAMPING * float(gram.diagonal().mean())


@pytest.mark.parametrize("shape", SHAPES)
def test_the_full_map_is_least_squares_with_a_ridge(shape: tuple[int, int]) -> None:
    inputs, targets, gram, cross, weight = problem(shape)
    found, used = ridge(gram, cross, DAMPING)
    assert used == DAMPING
    torch.testing.assert_close(found, reference.full_map(inputs, targets, weight), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_no_map_of_the_rank_is_better(shape: tuple[int, int]) -> None:
    inputs, targets, gram, cross, weight = problem(shape)
    for rank in (1, 3):
        U, V = reduced_rank_ridge(gram, cross, rank, DAMPING)
        assert (U.shape, V.shape) == ((shape[0], rank), (rank, shape[1]))
        found = reference.objective(inputs, targets, weight, U @ V)
        best = reference.best_of_rank(inputs, targets, weight, rank)
        least = reference.objective(inputs, targets, weight, best)
        assert found <= least * (1 + 1e-9)
        assert found >= least * (1 - 1e-4), "alternating least squares has not converged: no reference"


@pytest.mark.parametrize("shape", SHAPES)
def test_the_error_falls_with_the_rank_down_to_the_full_map(shape: tuple[int, int]) -> None:
    inputs, targets, gram, cross, weight = problem(shape)
    maps = [torch.zeros(shape, dtype=torch.float64)]
    for rank in range(1, min(shape) + 1):
        U, V = reduced_rank_ridge(gram, cross, rank, DAMPING)
        maps.append(U @ V)
    errors = [reference.objective(inputs, targets, weight, M) for M in maps]
    assert all(after < before for before, after in pairwise(errors))
    torch.testing.assert_close(maps[-1], ridge(gram, cross, DAMPING)[0], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_float32_sums_are_enough(shape: tuple[int, int]) -> None:
    _, _, gram, cross, _ = problem(shape)
    U, V = reduced_rank_ridge(gram.float(), cross.float(), 3, DAMPING)
    assert U.dtype == V.dtype == torch.float32
    wanted_U, wanted_V = reduced_rank_ridge(gram, cross, 3, DAMPING)
    torch.testing.assert_close((U @ V).double(), wanted_U @ wanted_V, rtol=1e-3, atol=1e-4)


def test_what_is_not_finite_is_refused() -> None:
    _, _, gram, cross, _ = problem((6, 10))
    bad = gram.clone()
    bad[1, 1] = float("nan")
    with pytest.raises(ValueError, match="input statistics"):
        reduced_rank_ridge(bad, cross, 2, DAMPING)
    cross[2, 3] = float("inf")
    with pytest.raises(ValueError, match="outputs to be predicted"):
        reduced_rank_ridge(gram, cross, 2, DAMPING)

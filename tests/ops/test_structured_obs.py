"""The refit and the order of removal, against slow ones in float64 written from the formulas."""

import pytest
import torch

from decoct.ops.least_squares import refit_columns
from decoct.ops.structured_obs import removal_order
from tests.reference.inputs import correlated, gaussian

OUT, IN, TOKENS = 12, 24, 400
DAMPING = 0.01


def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    w, x = gaussian(OUT, IN, seed=1), correlated(TOKENS, IN) + 0.3
    return w, x, 2.0 / TOKENS * x.T @ x


def output_error(w: torch.Tensor, v: torch.Tensor, x: torch.Tensor, kept: list[int], *, shifted: bool) -> float:
    y = x.double() @ w.double().T
    z = x.double()[:, kept] @ v.double().T
    gap = y - z
    if shifted:
        gap = gap - gap.mean(0)
    return float(gap.square().sum())


@pytest.mark.parametrize("shifted", [False, True])
def test_refit_is_the_least_squares_solution(shifted: bool) -> None:
    w, x, H = problem()
    kept = [0, 3, 4, 9, 11, 17, 20, 23]
    mean = x.mean(0) if shifted else None
    found = refit_columns(w, H, torch.tensor(kept), mean, damping=1e-7)
    y, z = x.double() @ w.double().T, x.double()[:, kept]
    if shifted:
        y, z = y - y.mean(0), z - z.mean(0)
    wanted = torch.linalg.lstsq(z, y).solution.T
    torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=1e-4)
    assert output_error(w, found, x, kept, shifted=shifted) < 0.9 * output_error(
        w, w[:, kept], x, kept, shifted=shifted
    )


def test_refit_to_all_columns_changes_nothing() -> None:
    w, _, H = problem()
    assert torch.equal(refit_columns(w, H, torch.arange(IN)), w)


def slow_order(w: torch.Tensor, H: torch.Tensor, unit: int, count: int) -> list[int]:
    """Each time the unit without which the others, refitted by ridge regression, lose least."""
    w, H = w.double(), H.double()
    ridge = H + DAMPING * torch.diagonal(H).mean() * torch.eye(IN, dtype=torch.float64)
    gone: list[int] = []
    for _ in range(count):
        losses = {}
        for candidate in range(IN // unit):
            if candidate in gone:
                continue
            out = [c for u in [*gone, candidate] for c in range(u * unit, (u + 1) * unit)]
            stay = [c for c in range(IN) if c not in out]
            # min over V of tr((w - V)·R·(w - V)ᵀ), V zero in `out`: the Schur complement of what stays.
            schur = ridge[out][:, out] - ridge[out][:, stay] @ torch.linalg.solve(
                ridge[stay][:, stay], ridge[stay][:, out]
            )
            losses[candidate] = float((w[:, out] @ schur * w[:, out]).sum())
        gone.append(min(losses, key=losses.__getitem__))
    return gone


@pytest.mark.parametrize("unit", [1, 4])
def test_removal_one_by_one_is_the_slow_greedy_order(unit: int) -> None:
    w, _, H = problem()
    count = 10 if unit == 1 else 4
    found = removal_order(w, H, unit, count, rounds=count)
    assert found.gone.tolist() == slow_order(w, H, unit, count)


def test_rounds_take_several_at_a_time_and_no_more_than_asked() -> None:
    w, _, H = problem()
    found = removal_order(w, H, 1, 10, rounds=3)
    assert len(set(found.gone.tolist())) == 10
    alone = removal_order(w, H, 1, 10, rounds=1)
    assert alone.gone.tolist() == alone.first_scores.argsort()[:10].tolist()


def test_damage_is_refused() -> None:
    w, _, H = problem()
    H[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite"):
        removal_order(w, H, 1, 2, rounds=1)

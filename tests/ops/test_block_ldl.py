"""Feedback of errors, group by group, against the minimisation that it stands for."""

import pytest
import torch

from decoct.ops.block_ldl import block_ldlq
from decoct.ops.linalg import inverse_factor
from tests.reference.block_ldl import block_feedback
from tests.reference.inputs import correlated, gaussian, hessian, output_error

DAMPING = 0.01


def steps(values: torch.Tensor) -> torch.Tensor:
    return (values * 2).round() / 2


def damped(H: torch.Tensor) -> torch.Tensor:
    return H + DAMPING * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)


@pytest.mark.parametrize("group", [1, 3, 4, 8, 40])
@pytest.mark.parametrize("cols", [24, 29])
def test_groups_are_rounded_where_the_reference_rounds_them(group: int, cols: int) -> None:
    w, H = gaussian(6, cols, dtype=torch.float64), hessian(correlated(200, cols))
    upper = inverse_factor(H, DAMPING).upper
    found = block_ldlq(w.T.contiguous(), upper, group, lambda _, wanted: steps(wanted)).T
    assert torch.equal(found, block_feedback(w, damped(H), group, steps))


def test_groups_come_in_order_and_whole() -> None:
    w, H = gaussian(6, 29, dtype=torch.float64), hessian(correlated(200, 29))
    seen: list[tuple[int, int]] = []

    def rounded(first: int, wanted: torch.Tensor) -> torch.Tensor:
        seen.append((first, len(wanted)))
        return steps(wanted)

    features = w.T.contiguous()
    block_ldlq(features, inverse_factor(H, DAMPING).upper, 8, rounded)
    assert seen == [(0, 8), (8, 8), (16, 8), (24, 5)]
    assert torch.equal(features, w.T)


def test_feedback_pays() -> None:
    x = correlated(300, 32)
    w = gaussian(16, 32)
    upper = inverse_factor(hessian(x), DAMPING).upper.float()
    found = block_ldlq(w.T.contiguous(), upper, 4, lambda _, wanted: steps(wanted)).T
    assert output_error(found - w, x) < 0.5 * output_error(steps(w) - w, x)

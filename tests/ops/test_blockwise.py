"""Feedback from block to block against the paper's loop over columns, and against the optimum for whole blocks."""

import pytest
import torch

from decoct.ops.blockwise import feed_back_blocks
from decoct.ops.feedback import Elimination
from tests.reference import gptq as reference
from tests.reference.inputs import correlated, gaussian, hessian, output_error

OUT, STEP = 6, 0.5


def setting(width: int, dead: tuple[int, ...] = ()) -> tuple[torch.Tensor, torch.Tensor]:
    x = correlated(3 * width, width)
    x[:, list(dead)] = 0
    return gaussian(OUT, width, seed=5), x


class Steps:
    """Rounds to multiples of a step, feature by feature within a block or all at once; notes what it was given."""

    def __init__(self, shape: torch.Size, *, one_by_one: bool) -> None:
        self.out = torch.full(shape, torch.nan)
        self.given: list[tuple[int, torch.Tensor]] = []
        self.one_by_one = one_by_one

    def __call__(self, start: int, values: torch.Tensor, within: Elimination) -> torch.Tensor:
        self.given.append((start, values.clone()))
        rounded = values.div(STEP).round() * STEP
        if self.one_by_one:

            def rounding(column: torch.Tensor, feature: int, lost: torch.Tensor) -> None:
                rounded[:, feature] = column.div(STEP).round() * STEP
                lost.copy_(column - rounded[:, feature])

            within.run(values, rounding)
        self.out[:, start : start + values.shape[1]] = rounded
        return rounded


def rounded(w: torch.Tensor, x: torch.Tensor, block: int, *, one_by_one: bool) -> Steps:
    steps = Steps(w.shape, one_by_one=one_by_one)
    feed_back_blocks(w, Elimination.of(hessian(x).float(), act_order=False), steps, block)
    return steps


@pytest.mark.parametrize(("width", "block"), [(1, 1), (17, 4), (40, 16), (64, 64), (70, 128), (33, 1)])
def test_one_by_one_within_blocks_is_the_papers_loop(width: int, block: int) -> None:
    w, x = setting(width, dead=() if width == 1 else (0,))
    found = rounded(w, x, block, one_by_one=True).out
    expected = reference.column_loop(w, hessian(x), lambda v, _: v.div(STEP).round() * STEP, act_order=False)
    differing = ((found.double() - expected).abs() > 1e-4).any(1)
    assert int(differing.sum()) <= 1, "one row may part ways at a tie"


def test_blocks_come_in_order_and_cover_everything() -> None:
    w, x = setting(23)
    steps = rounded(w, x, 8, one_by_one=False)
    assert [(start, values.shape[1]) for start, values in steps.given] == [(0, 8), (8, 8), (16, 7)]
    assert torch.isfinite(steps.out).all()


@pytest.mark.parametrize("one_by_one", [False, True])
def test_a_block_is_where_the_output_error_of_those_before_it_is_least(*, one_by_one: bool) -> None:
    w, x = setting(24)
    steps = rounded(w, x, 8, one_by_one=one_by_one)
    q = steps.out.double()
    H = hessian(x) + 0.01 * torch.diagonal(hessian(x)).mean() * torch.eye(24, dtype=torch.float64)
    for start, given in steps.given[1:]:
        lost = w.double()[:, :start] - q[:, :start]
        best = w.double()[:, start:] + lost @ H[:start, start:] @ torch.linalg.inv(H[start:, start:])
        torch.testing.assert_close(given.double(), best[:, : given.shape[1]], rtol=1e-3, atol=1e-3)


def test_feedback_pays_and_nothing_given_is_changed() -> None:
    w, x = setting(64)
    before = w.clone()
    nearest = output_error(w.div(STEP).round() * STEP - w, x)
    whole = output_error(rounded(w, x, 16, one_by_one=False).out - w, x)
    single = output_error(rounded(w, x, 16, one_by_one=True).out - w, x)
    assert single < whole < nearest
    assert torch.equal(w, before)

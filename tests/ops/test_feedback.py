"""The loop of rounding with feedback: its order, its pivots, kept features, outliers and tables."""

import pytest
import torch

from decoct.ops.feedback import Elimination, GridRounding, OutlierRounding, TableRounding
from decoct.ops.grid import dequantize, fit_grid, quantize
from tests.reference import gptq as reference
from tests.reference import kmeans
from tests.reference import owq as columns
from tests.reference.inputs import correlated, gaussian, hessian

OUT, IN = 12, 40


def setting(width: int = IN, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return gaussian(OUT, width, seed=seed + 5), hessian(correlated(3 * width, width, seed)).float()


def damped(H: torch.Tensor, damping: float = 0.01) -> torch.Tensor:
    return torch.tensor(reference.prepared(H.tolist(), damping, act_order=False)[0], dtype=torch.float64)


class Recorder:
    """Rounds to multiples of a half and notes the order."""

    def __init__(self) -> None:
        self.order: list[int] = []
        self.rounded = torch.full((OUT, IN), torch.nan)

    def __call__(self, column: torch.Tensor, feature: int, lost: torch.Tensor) -> None:
        self.order.append(feature)
        self.rounded[:, feature] = (column * 2).round() / 2
        torch.sub(column, self.rounded[:, feature], out=lost)


@pytest.mark.parametrize("act_order", [False, True])
def test_every_feature_once_in_order(act_order: bool) -> None:
    w, H = setting()
    recorder = Recorder()
    left = Elimination.of(H, act_order=act_order).run(w, recorder)
    assert left.shape == (OUT, 0)
    falling = sorted(range(IN), key=lambda j: -float(H[j, j]))
    assert recorder.order == (falling if act_order else list(range(IN)))


@pytest.mark.parametrize("act_order", [False, True])
def test_pivots_are_the_cholesky_factors_diagonal(act_order: bool) -> None:
    _, H = setting()
    found = Elimination.of(H, act_order=act_order).pivots()
    order = sorted(range(IN), key=lambda j: -float(H[j, j])) if act_order else list(range(IN))
    inverse = torch.linalg.inv(damped(H)[order][:, order])
    U = torch.linalg.cholesky(inverse, upper=True)
    expected = dict(zip(order, torch.diagonal(U).tolist(), strict=True))
    torch.testing.assert_close(
        found.double(), torch.tensor([expected[j] for j in range(IN)]).double(), rtol=1e-3, atol=0
    )


@pytest.mark.parametrize("num_kept", [1, 3, 17, 39])
def test_kept_features_make_up_for_all_others_as_well_as_they_can(num_kept: int) -> None:
    w, H = setting()
    kept = torch.randperm(IN, generator=torch.Generator().manual_seed(1))[:num_kept]
    recorder = Recorder()
    left = Elimination.of(H, last=kept).run(w, recorder, num_kept=num_kept)
    assert not set(recorder.order) & set(kept.tolist())
    best = columns.best_kept(w, recorder.rounded, kept.tolist(), damped(H))
    torch.testing.assert_close(left.double(), best, rtol=1e-3, atol=1e-3)


def test_what_was_given_is_not_changed() -> None:
    w, H = setting()
    before = w.clone(), H.clone()
    Elimination.of(H).run(w, Recorder())
    assert torch.equal(w, before[0])
    assert torch.equal(H, before[1])


def test_features_that_are_not_rounded_have_the_code_of_zero() -> None:
    w, H = setting()
    kept = torch.tensor([7, 0, 21])
    for symmetric in (True, False):
        for group_size in (8, "channel", "tensor"):
            grid = fit_grid(w, bits=3, group_size=group_size, symmetric=symmetric)
            rounding = GridRounding(grid, (OUT, IN))
            Elimination.of(H, last=kept).run(w, rounding, num_kept=3)
            values = dequantize(rounding.finish(), grid)
            assert not values[:, kept].any()
            assert bool(values.any(0).sum() == IN - 3)


@pytest.mark.parametrize("masked", [False, True])
def test_tables_are_the_references_loop(masked: bool) -> None:
    w, H = setting()
    tables = gaussian(OUT, 8, seed=3).sort(1).values
    mask = gaussian(OUT, IN, seed=4) > 0 if masked else None

    def rounded(column: torch.Tensor, j: int) -> torch.Tensor:
        rows = enumerate(zip(column.tolist(), tables.tolist(), strict=True))
        return torch.tensor(
            [t[kmeans.nearest(v, t)] if mask is None or mask[i, j] else 0.0 for i, (v, t) in rows], dtype=torch.float64
        )

    expected = reference.column_loop(w, H, rounded)
    rounding = TableRounding(tables, IN, mask)
    Elimination.of(H).run(w, rounding)
    found = tables.gather(1, rounding.finish().long())
    found = found if mask is None else found * mask
    differing = ((found.double() - expected).abs() > 1e-5).any(1)
    assert int(differing.sum()) <= 1  # a value on the middle of two entries may go either way in float32


@pytest.mark.parametrize("limit", [0.0, 0.02, torch.inf])
def test_outliers_are_what_exceeds_the_limit_and_their_loss_is_stored(limit: float) -> None:
    w, _ = setting()
    grid = fit_grid(w, bits=2, group_size="channel")
    inner = GridRounding(grid, (OUT, IN))
    watched = OutlierRounding(inner, (OUT, IN), torch.full((IN, 1), limit), torch.bfloat16)
    white = Elimination.of(torch.eye(IN))  # nothing reaches other features
    white.run(w, watched)
    lost = w - dequantize(quantize(w, grid), grid)
    found = watched.finish()
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, torch.where(lost.square() > limit, lost, 0).bfloat16())


def test_an_entry_with_a_negative_limit_is_stored_even_if_its_loss_is_small() -> None:
    w, H = setting()
    grid = fit_grid(w, bits=8, group_size="channel")
    chosen = gaussian(OUT, IN, seed=8) > 1.5
    watched = OutlierRounding(
        GridRounding(grid, (OUT, IN)), (OUT, IN), torch.where(chosen.T, -1.0, torch.inf), torch.float16
    )
    Elimination.of(H).run(w, watched)
    found = watched.finish()
    assert not found[~chosen].any()
    assert bool(found[chosen].any())

"""Scales of signs and trits against trying everything, and least squares against a solver that knows no shortcuts."""

import pytest
import torch

from decoct.ops.rank_one import best_rank_one, fit_columns, fit_rows
from decoct.ops.refit import refit_scales
from decoct.ops.signs import finite_scale, group_mean, largest_entries, residual_error, residual_sizes, two_sizes
from decoct.ops.ternary import fit_ternary, round_ternary
from tests.reference import binary as reference
from tests.reference.inputs import correlated, gaussian, hessian, output_error

ROWS, COLS = 7, 24


def weights(*shape: int, zeros: bool = False) -> torch.Tensor:
    found = gaussian(*shape, seed=3).abs() + 0.05
    return found * (gaussian(*shape, seed=4) > -0.5) if zeros else found


@pytest.mark.parametrize("group_size", [4, 8, 24])
@pytest.mark.parametrize("weighted", [False, True])
def test_ternary_scales_are_the_best_of_all(group_size: int, weighted: bool) -> None:
    w = gaussian(ROWS, COLS)
    w[2] = 0
    w[3, :8] = w[3, 0]
    importance = weights(COLS) if weighted else None
    h = [1.0] * COLS if importance is None else importance.tolist()
    scale = fit_ternary(w, group_size=group_size, scale_dtype=torch.float32, importance=importance)
    for i, row in enumerate(w.tolist()):
        for g in range(COLS // group_size):
            part = slice(g * group_size, (g + 1) * group_size)
            expected = reference.ternary_scale(row[part], h[part]) or 1.0
            assert float(scale[i, g]) == pytest.approx(expected, rel=1e-5)
            assert round_ternary(w, scale)[i, part].tolist() == [reference.trit(v, expected) for v in row[part]]


def test_absmean_is_the_mean_of_what_is_there() -> None:
    w = gaussian(ROWS, COLS)
    mask = gaussian(ROWS, COLS, seed=8) > 0
    plain = fit_ternary(w, group_size=COLS, fit="absmean", scale_dtype=torch.float32)
    torch.testing.assert_close(plain.squeeze(1), w.abs().mean(1))
    masked = fit_ternary(w * mask, group_size=COLS, fit="absmean", scale_dtype=torch.float32, mask=mask)
    expected = [[reference.mean([abs(v) for v, m in zip(r, k, strict=True) if m], [1.0] * sum(k))]
                for r, k in zip(w.tolist(), mask.tolist(), strict=True)]  # fmt: skip
    torch.testing.assert_close(masked, torch.tensor(expected))


def test_the_optimum_is_no_worse_than_the_papers_thresholds() -> None:
    w = gaussian(50, 128)
    optimal = fit_ternary(w, group_size=128, scale_dtype=torch.float32)
    lost = (w - round_ternary(w, optimal) * optimal).square().sum(1)
    kept = w.abs() > 0.7 * w.abs().mean(1, keepdim=True)  # TWN
    twn = (w.abs() * kept).sum(1, keepdim=True) / kept.sum(1, keepdim=True)
    assert (lost <= (w - w.sign() * kept * twn).square().sum(1) * (1 + 1e-6)).all()
    absmean = fit_ternary(w, group_size=128, fit="absmean", scale_dtype=torch.float32)
    assert (lost <= (w - round_ternary(w, absmean) * absmean).square().sum(1) * (1 + 1e-6)).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scales_that_are_not_finite_are_refused(bad: float) -> None:
    w = gaussian(2, 8)
    w[1, 3] = bad
    for fit in ("optimal", "absmean"):
        with pytest.raises(ValueError, match="not finite or too large"):
            fit_ternary(w, group_size=8, fit=fit)
    with pytest.raises(ValueError, match=r"too large for scales in torch\.float16"):
        finite_scale(torch.tensor([1e6]), torch.float16)


@pytest.mark.parametrize("zeros", [False, True])
def test_two_sizes_are_the_best_split(zeros: bool) -> None:
    size, weight = gaussian(ROWS, COLS).abs(), weights(ROWS, COLS, zeros=zeros)
    size[2] = 0.5
    size[4] *= weight[4] > 0
    weight[5] = 0
    found, shared = two_sizes(size, weight)
    assert shared is None
    for i in range(ROWS):
        low, high, least = reference.two_sizes(size[i].tolist(), weight[i].tolist())
        near = (size[i] - found[i].unsqueeze(1)).abs().amin(0).square()
        assert float((near * weight[i]).sum()) == pytest.approx(least, rel=1e-4, abs=1e-6)
        assert found[i].tolist() == pytest.approx([low, high], rel=1e-4, abs=1e-6) or zeros
    assert not found[5].any()


def test_a_shared_split_is_the_one_with_the_least_error_in_all() -> None:
    size = gaussian(ROWS, COLS).abs()
    splits = torch.linspace(0.2, 1.8, 17)
    found, shared = two_sizes(size, torch.ones_like(size), splits)
    errors = [sum(reference.split_error(row, float(s)) for row in size.tolist()) for s in splits]
    assert shared is not None
    assert float(shared) == float(splits[errors.index(min(errors))])
    expected = [reference.split_sizes(row, float(shared)) for row in size.tolist()]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_residual_sizes_and_their_error() -> None:
    size, weight = gaussian(ROWS, COLS).abs(), weights(ROWS, COLS, zeros=True)
    weight[5] = 0
    found = residual_sizes(size, weight)
    expected = [reference.residual_sizes(v, h) for v, h in zip(size.tolist(), weight.tolist(), strict=True)]
    torch.testing.assert_close(found, torch.tensor(expected))
    lost = (size.unsqueeze(-1) - found.unsqueeze(1)).abs().amin(-1).square()
    torch.testing.assert_close(residual_error(size, weight), (lost * weight).sum())
    assert float(residual_error(size[:, :0], weight[:, :0])) == 0


def test_group_means_and_largest_entries() -> None:
    size, weight = gaussian(ROWS, COLS).abs(), weights(ROWS, COLS, zeros=True)
    found = group_mean(size, 8, weight)
    for i in range(ROWS):
        for g in range(3):
            part = slice(8 * g, 8 * g + 8)
            assert float(found[i, g]) == pytest.approx(reference.mean(size[i, part].tolist(), weight[i, part].tolist()))
    kept = largest_entries(size, 10)
    assert int(kept.sum()) == 10
    assert float(size[kept].min()) > float(size[~kept].max())
    assert largest_entries(torch.ones(2, 3), 2).tolist() == [[True, True, False], [False, False, False]]


@pytest.mark.parametrize("planes", [1, 2])
def test_refitted_scales_are_the_least_squares_solution(planes: int) -> None:
    w, x = gaussian(ROWS, COLS), correlated(200, COLS)
    H = hessian(x)
    index = torch.tensor([0, 1, 2, 0] * 6)
    units = [gaussian(ROWS, COLS, seed=20 + p).sign() * (gaussian(ROWS, COLS, seed=30 + p) > -1) for p in range(planes)]
    start = [torch.full((ROWS, 3), 0.3) for _ in range(planes)]
    found = torch.cat(refit_scales(w, H.float(), units, start, index), 1)
    for i in range(ROWS):
        design = [unit[i] * (index == g) for unit in units for g in range(3)]
        expected = reference.least_squares_scales(w[i], H, design, torch.full((3 * planes,), 0.3))
        torch.testing.assert_close(found[i].double(), expected, rtol=1e-3, atol=1e-3)
        best = reference.least_squares_scales(w[i], H, design)
        lost = [
            output_error(w[i : i + 1] - sum(a * d for a, d in zip(scales, design, strict=True)), x)
            for scales in (found[i], best)
        ]
        assert lost[1] * (1 - 1e-6) <= lost[0] <= 1.01 * lost[1], "the drag costs next to nothing"


def test_scales_that_nothing_depends_on_stay() -> None:
    w, H = gaussian(ROWS, COLS), hessian(correlated(200, COLS)).float()
    H[:8] = 0
    H[:, :8] = 0
    units = gaussian(ROWS, COLS, seed=5).sign()
    units[3, 8:16] = 0
    start = weights(ROWS, 3)
    (found,) = refit_scales(w, H, [units], [start], torch.arange(COLS) // 8)
    torch.testing.assert_close(found[:, 0], start[:, 0])
    assert float(found[3, 1]) == pytest.approx(float(start[3, 1]))
    assert (found[:, 2] != start[:, 2]).all()
    (same,) = refit_scales(w, torch.zeros_like(H), [units], [start], torch.arange(COLS) // 8)
    torch.testing.assert_close(same, start)


def test_the_best_rank_one_is_the_first_singular_pair() -> None:
    size = gaussian(20, 30).abs()
    a, b = best_rank_one(size)
    U, s, V = torch.linalg.svd(size.double())
    torch.testing.assert_close(torch.outer(a, b).double(), s[0] * torch.outer(U[:, 0], V[0]), rtol=1e-4, atol=1e-5)
    assert float(b.mean()) == pytest.approx(1)
    assert not torch.outer(*best_rank_one(torch.zeros(3, 4))).any()


def test_rank_one_of_what_is_there_ignores_the_rest() -> None:
    a, b = weights(20), gaussian(30, seed=9).abs() + 0.1
    mask = gaussian(20, 30, seed=11) > 0
    loud = torch.where(mask, torch.outer(a, b), 100.0)
    found = torch.outer(*best_rank_one(loud, mask))
    torch.testing.assert_close(found, torch.outer(a, b), rtol=1e-3, atol=1e-4)


def test_vectors_are_least_squares_solutions_given_the_other() -> None:
    w, x = gaussian(ROWS, COLS), correlated(200, COLS)
    H, units = hessian(x), gaussian(ROWS, COLS, seed=6).sign()
    columns = weights(COLS)
    rows = fit_rows(w, H.float(), units, columns)
    for i in range(ROWS):
        expected = reference.least_squares_scales(w[i], H, [units[i] * columns])
        assert float(rows[i]) == pytest.approx(float(expected), rel=1e-3, abs=1e-4)
    found = fit_columns(w, H.float(), units, rows, columns)
    scaled = units * rows.unsqueeze(1)
    values, vectors = torch.linalg.eigh(H)
    root = vectors * values.clamp(min=0).sqrt()
    A = torch.cat([scaled[i].double().unsqueeze(1) * root for i in range(ROWS)], 1)  # [in, rows * in]
    best = torch.linalg.lstsq(A.T, (w.double() @ root).reshape(-1, 1)).solution.squeeze(1)
    lost = [output_error(w - scaled * b, x) for b in (columns, found, best)]
    assert lost[2] <= lost[1] <= 1.001 * lost[2]
    assert lost[1] < 0.9 * lost[0]

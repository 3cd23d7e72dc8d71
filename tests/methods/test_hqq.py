"""HQQ against the float64 loop, and what each of its settings is for."""

from typing import Any

import pytest
import torch

from decoct.methods.quantize.hqq import HQQ, half_quadratic_grid
from decoct.methods.quantize.rtn import RTN
from decoct.ops.grid import Grid, dequantize, quantize
from decoct.weights import Dense, GroupInt, LowRank, Masked, Sparse
from tests.reference import hqq as reference
from tests.reference.inputs import gaussian

ROWS, COLS, SIZE = 16, 64, 16
STARTS = (1.0, 0.85, 0.7)


def heavy(rows: int = ROWS, cols: int = COLS, seed: int = 0) -> torch.Tensor:
    """Rows of different size, off centre, a few outliers, one row of one sign."""
    w = gaussian(rows, cols, seed=seed) * gaussian(rows, 1, seed=seed + 1).exp()
    w[:, ::13] *= 3
    w[0] = w[0].abs() + 0.2
    return w


def groups(w: torch.Tensor, size: int = SIZE) -> list[list[float]]:
    return w.double().reshape(-1, size).tolist()


def pairs(grid: Grid) -> list[tuple[float, float]]:
    assert grid.zero is not None
    return list(zip(grid.scale.double().flatten().tolist(), grid.zero.double().flatten().tolist(), strict=True))


def total(w: torch.Tensor, found: list[tuple[float, float]], bits: int, p: float, size: int = SIZE) -> float:
    return sum(reference.loss(group, pair, bits, p) for group, pair in zip(groups(w, size), found, strict=True))


def squared(w: torch.Tensor, grid: Grid) -> float:
    return float((dequantize(quantize(w, grid), grid) - w).square().sum())


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("p", [0.7, 1.0, 2.0])
@pytest.mark.parametrize("learn_scale", [True, False])
@pytest.mark.parametrize("zero", ["real", "integer"])
def test_against_the_reference(bits: int, p: float, learn_scale: bool, zero: str) -> None:
    w = heavy(seed=bits)
    for clip_search in (False, True):
        method = HQQ(bits=bits, group_size=SIZE, lp_norm=p, zero=zero, learn_scale=learn_scale, clip_search=clip_search)
        found = pairs(half_quadratic_grid(w, method))
        starts = STARTS if clip_search else (1.0,)
        settings = reference.Settings(bits, p, learn_scale=learn_scale, integer=zero == "integer", starts=starts)
        expected = [reference.fit(group, settings) for group in groups(w)]
        # a weight that float32 rounds the other way sends its group down another path; nearly all must agree
        losses = [
            [reference.loss(g, pair, bits, p) for g, pair in zip(groups(w), ps, strict=True)]
            for ps in (found, expected)
        ]
        same = sum(f == pytest.approx(e, rel=1e-5) for f, e in zip(*losses, strict=True))
        assert same >= 0.9 * len(expected)
        assert total(w, found, bits, p) == pytest.approx(total(w, expected, bits, p), rel=5e-3)


def test_snapping_against_the_reference() -> None:
    w = heavy()
    w[:, ::5] *= 0.02
    real, snapped = (
        pairs(half_quadratic_grid(w, HQQ(bits=3, group_size=SIZE, zero=zero))) for zero in ("real", "snapped")
    )
    squares = w.double().square().mean(0).reshape(-1, SIZE).tolist()
    expected = [
        reference.snapped(group, pair, squares[number % len(squares)], 3)
        for number, (group, pair) in enumerate(zip(groups(w), real, strict=True))
    ]
    assert snapped == expected
    changed = sum(a != b for a, b in zip(real, snapped, strict=True))
    assert 0 < changed < len(real)


def test_quiet_columns_stay_quiet() -> None:
    """What snapping is for: inputs that training met with small weights must not meet large errors."""
    w = gaussian(64, 128, seed=3)
    w[:, 7] *= 0.01
    lost = {}
    for zero in ("real", "snapped", "integer"):
        weight = HQQ(bits=3, group_size=32, zero=zero).compress(Dense.of(w))
        lost[zero] = (weight.unpack() - w).square()
    assert float(lost["snapped"][:, 7].sum()) < 0.1 * float(lost["real"][:, 7].sum())
    assert float(lost["snapped"].sum()) < float(lost["integer"].sum())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_addition_helps(bits: int) -> None:
    w = heavy(64, 256)
    settings: dict[str, Any] = {"bits": bits, "group_size": 64, "zero": "real"}
    errors = [
        squared(w, half_quadratic_grid(w, HQQ(learn_scale=learn, clip_search=search, num_steps=steps, **settings)))
        for learn, search, steps in ((False, False, 0), (False, False, 20), (True, False, 20), (True, True, 20))
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.95 * errors[0]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_better_than_rounding_to_nearest(bits: int) -> None:
    w = Dense.of(heavy(64, 256))
    rounded = RTN(bits=bits, group_size=64, symmetric=False, clip_search=True).compress(w)
    for zero, limit in (("real", 0.97), ("snapped", 0.99), ("integer", 1.02)):
        found = HQQ(bits=bits, group_size=64, zero=zero).compress(w)
        lost, before = ((x.unpack() - w.values).square().sum() for x in (found, rounded))
        assert float(lost) < limit * float(before)


def test_a_norm_below_2_lowers_that_norm() -> None:
    w = heavy(64, 256)
    found = {p: pairs(half_quadratic_grid(w, HQQ(bits=3, zero="real", lp_norm=p))) for p in (0.7, 2.0)}
    assert total(w, found[0.7], 3, 0.7, 64) < total(w, found[2.0], 3, 0.7, 64)
    assert total(w, found[2.0], 3, 2.0, 64) < total(w, found[0.7], 3, 2.0, 64)


@pytest.mark.parametrize("group_size", [SIZE, "channel", "tensor"])
@pytest.mark.parametrize("zero", ["snapped", "real", "integer"])
def test_bits_per_weight(group_size: int | str, zero: str) -> None:
    weight = HQQ(bits=4, group_size=group_size, zero=zero).compress(Dense.of(heavy()))
    assert isinstance(weight, GroupInt)
    rows, columns = {SIZE: (ROWS, COLS // SIZE), "channel": (ROWS, 1), "tensor": (1, 1)}[group_size]
    zero_bytes = rows * ((columns * 4 + 7) // 8) if zero == "integer" else 2 * rows * columns
    assert weight.nbytes == ROWS * COLS // 2 + 2 * rows * columns + zero_bytes


@pytest.mark.parametrize("group_size", ["channel", "tensor"])
def test_whole_rows_and_whole_matrices(group_size: str) -> None:
    w = heavy()
    grid = half_quadratic_grid(w, HQQ(bits=3, group_size=group_size, zero="real", clip_search=False))
    size = COLS if group_size == "channel" else ROWS * COLS
    expected = [reference.fit(group, reference.Settings(3, 2.0)) for group in groups(w, size)]
    assert total(w, pairs(grid), 3, 2.0, size) == pytest.approx(total(w, expected, 3, 2.0, size), rel=2e-2)


def test_pruned_entries_stay_zero_and_do_not_count() -> None:
    w, kept = heavy(), gaussian(ROWS, COLS, seed=9) > 0
    kept[2] = False
    kept[3, :SIZE] = False
    found = HQQ(bits=3, group_size=SIZE).compress(Sparse.of(w, kept))
    assert isinstance(found, Masked)
    assert torch.equal(found.survivors(), kept)
    assert not found.unpack()[~kept].any()
    loud = torch.where(kept, w, 50.0)
    assert torch.equal(
        dequantize(
            quantize(w, grid := half_quadratic_grid(loud, HQQ(bits=3, group_size=SIZE, zero="real"), kept)), grid
        )[kept],
        dequantize(quantize(w, same := half_quadratic_grid(w, HQQ(bits=3, group_size=SIZE, zero="real"), kept)), same)[
            kept
        ],
    )
    zeros = HQQ(bits=3, group_size=SIZE, zero="real").compress(Dense.of(w * kept))
    lost, before = ((x.unpack() - w)[kept].square().sum() for x in (found, zeros))
    assert float(lost) < float(before)


def test_low_rank_factors_are_quantized_each() -> None:
    pair = LowRank.of(Dense.of(gaussian(24, 16)), Dense.of(gaussian(16, 32, seed=1)))
    found = HQQ(bits=4, group_size="channel").compress(pair)
    assert isinstance(found, LowRank)
    assert [child.kind for child in found.children().values()] == ["GroupInt", "GroupInt"]


def test_groups_that_lie_far_from_zero_and_groups_of_one_number() -> None:
    w = torch.zeros(4, 32)
    w[0] = 5 + 0.001 * gaussian(32)
    w[1] = -3.7
    w[2, :16] = 2.5
    for zero in ("snapped", "real"):
        found = HQQ(bits=4, group_size=16, zero=zero).compress(Dense.of(w)).unpack()
        torch.testing.assert_close(found, w, rtol=2e-3, atol=0)
        assert not found[3].any()


def test_many_rows_are_worked_in_parts_without_a_seam() -> None:
    w = gaussian(20, 1 << 15)
    method = HQQ(bits=3, zero="real")
    whole, last = half_quadratic_grid(w, method), half_quadratic_grid(w[-3:], method)
    assert torch.equal(whole.scale[-3:], last.scale)
    assert whole.zero is not None
    assert last.zero is not None
    assert torch.equal(whole.zero[-3:], last.zero)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"zero": "float"}, "zero must be one of snapped, real, integer, not 'float'"),
        ({"lp_norm": 0.0}, "lp_norm must be above 0 and at most 2"),
        ({"lp_norm": 2.5}, "lp_norm must be above 0 and at most 2"),
        ({"beta": 0.0}, "beta must be positive"),
        ({"num_steps": -1}, "num_steps 0 or more"),
        ({"bits": 1}, "bits must be 2 to 8"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HQQ(**settings)

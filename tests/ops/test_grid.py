"""Uniform grids against the float64 reference."""

import itertools

import pytest
import torch

from decoct.ops.grid import Grid, dequantize, fit_grid, quantize, quantize_packed, resolve_group_size
from decoct.ops.packing import pack_bits
from tests.reference import grids as reference
from tests.reference.inputs import gaussian

BITS = range(2, 9)
SYMMETRY = pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
HALVES = (torch.float16, torch.bfloat16)


def heavy_tailed(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    """Rows of different size with a few outliers, and one with only positive entries."""
    w = gaussian(rows, cols, seed=seed) * gaussian(rows, 1, seed=seed + 1).abs()
    w[:, ::11] *= 4
    w[0] = w[0].abs()
    return w


def double(rows: reference.Matrix) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def group_errors(w: torch.Tensor, grid: Grid, importance: torch.Tensor | None = None) -> torch.Tensor:
    """Weighted squared error of each group, float64."""
    error = (dequantize(quantize(w, grid), grid).double() - w.double()).square()
    error = error if importance is None else error * importance.double()
    return error.reshape(w.shape[0], -1, grid.group_size).sum(-1)


@SYMMETRY
@pytest.mark.parametrize("bits", BITS)
def test_grid_codes_and_values_are_the_references(bits: int, symmetric: bool) -> None:
    w = heavy_tailed(6, 24, seed=bits)
    for group_size, dtype in itertools.product((4, 8, "channel", "tensor"), (*HALVES, torch.float32)):
        grid = fit_grid(w, bits=bits, group_size=group_size, symmetric=symmetric, scale_dtype=dtype)
        expected = reference.fit(w.tolist(), bits, group_size, symmetric, dtype)
        assert (grid.bits, grid.group_size, grid.scale.dtype) == (bits, expected.group_size, dtype)
        torch.testing.assert_close(grid.scale.double(), double(expected.scale), rtol=1e-6, atol=0)
        if symmetric:
            assert grid.zero is None
        else:
            assert grid.zero is not None
            assert grid.zero.dtype == torch.uint8
            assert grid.zero.tolist() == expected.zero
        given = reference.Grids(grid.scale.tolist(), expected.zero, bits, grid.group_size)
        codes = quantize(w, grid)
        assert codes.dtype == torch.uint8
        assert not reference.differences(w.tolist(), given, codes.tolist())
        values = double(reference.values(codes.tolist(), given))
        torch.testing.assert_close(dequantize(codes, grid).double(), values, rtol=1e-6, atol=0)


@SYMMETRY
@pytest.mark.parametrize("bits", BITS)
def test_zero_is_exactly_on_the_grid(bits: int, symmetric: bool) -> None:
    w = heavy_tailed(6, 32)
    w[:, ::3] = 0
    w[3] = 0
    w[4] = w[4].abs() + 1
    w[5] = -w[5].abs() - 1
    for search in (False, True):
        for group_size in (8, "channel", "tensor"):
            grid = fit_grid(w, bits=bits, group_size=group_size, symmetric=symmetric, search=search)
            assert not dequantize(quantize(w, grid), grid)[w == 0].any()


@SYMMETRY
@pytest.mark.parametrize("bits", BITS)
def test_rounding_errs_by_about_half_a_step_at_most(bits: int, symmetric: bool) -> None:
    w = heavy_tailed(6, 32)
    grid = fit_grid(w, bits=bits, group_size=8, symmetric=symmetric, scale_dtype=torch.float32)
    steps = (dequantize(quantize(w, grid), grid) - w).abs() / grid.columns(0, 32)[0]
    limit = 0.5 if symmetric else 1.0  # the zero point is rounded too, which may clip the far end by half a step
    assert float(steps.max()) <= limit * (1 + 1e-4)


def test_small_half_precision_weights_keep_their_resolution() -> None:
    """A float16 scale may be subnormal: 8 bits of weights below 0.008 must still be 8 bits."""
    w = (gaussian(4, 32) * 1e-4).half()
    grid = fit_grid(w, bits=8, group_size=16, scale_dtype=torch.float16)
    error = (dequantize(quantize(w, grid), grid) - w.float()).abs().max()
    assert float(error) <= 0.02 * float(w.abs().max())


@SYMMETRY
@pytest.mark.parametrize("scale_dtype", HALVES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_largest_numbers_are_finite_or_refused(
    dtype: torch.dtype, scale_dtype: torch.dtype, symmetric: bool
) -> None:
    w = gaussian(2, 16).to(dtype)
    w[0, 3] = 0.9 * torch.finfo(dtype).max
    try:
        grid = fit_grid(w, bits=4, group_size=8, symmetric=symmetric, scale_dtype=scale_dtype)
    except ValueError:
        return
    finite = bool(torch.isfinite(dequantize(quantize(w, grid), grid)).all())
    assert finite


@SYMMETRY
@pytest.mark.parametrize("bits", BITS)
def test_clip_search_is_never_worse_and_helps_at_few_bits(bits: int, symmetric: bool) -> None:
    w = heavy_tailed(24, 64, seed=3)
    for importance in (None, gaussian(64, seed=5).square()):
        setting = {"bits": bits, "group_size": 16, "symmetric": symmetric, "importance": importance}
        plain = group_errors(w, fit_grid(w, **setting), importance)
        searched = group_errors(w, fit_grid(w, search=True, **setting), importance)
        assert (searched <= plain * (1 + 1e-5)).all()
        if bits <= 3:
            assert float(searched.sum()) < 0.95 * float(plain.sum())


def test_columns_expand_scale_and_zero() -> None:
    grid = fit_grid(heavy_tailed(3, 16), bits=3, group_size=4, symmetric=False)
    scale, zero = grid.columns(3, 9)
    index = torch.tensor([0, 1, 1, 1, 1, 2])
    assert grid.zero is not None
    assert torch.equal(scale, grid.scale[:, index].float())
    assert torch.equal(zero, grid.zero[:, index].float())
    assert fit_grid(heavy_tailed(3, 16), bits=3, group_size=4).columns(0, 2)[1].tolist() == [[4.0, 4.0]] * 3


def test_many_rows_are_worked_in_parts_without_a_seam() -> None:
    w = gaussian(20, 1 << 15)  # more elements than are worked on together
    whole = fit_grid(w, bits=4, group_size=64, symmetric=False)
    last = fit_grid(w[-3:], bits=4, group_size=64, symmetric=False)
    assert whole.zero is not None
    assert last.zero is not None
    assert torch.equal(whole.scale[-3:], last.scale)
    assert torch.equal(whole.zero[-3:], last.zero)
    codes = quantize(w, whole)
    assert torch.equal(codes[-3:], quantize(w[-3:], last))
    assert torch.equal(dequantize(codes, whole)[-3:], dequantize(codes[-3:], last))


@SYMMETRY
@pytest.mark.parametrize("group_size", [8, "tensor"])
def test_packed_codes_are_the_codes_packed(group_size: int | str, symmetric: bool) -> None:
    w = heavy_tailed(20, 1 << 15)[:, :-8]  # worked in parts, and a width that fills no power of two
    for bits in (3, 4, 8):
        grid = fit_grid(w, bits=bits, group_size=group_size, symmetric=symmetric)
        assert torch.equal(quantize_packed(w, grid), pack_bits(quantize(w, grid), bits))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("group_size", [4, "channel", "tensor"])
def test_weights_that_are_not_finite_are_refused(bad: float, group_size: int | str) -> None:
    w = gaussian(4, 8)
    w[2, 5] = bad
    for symmetric in (True, False):
        with pytest.raises(ValueError, match="the weights hold NaN or infinite values; the checkpoint is damaged"):
            fit_grid(w, bits=4, group_size=group_size, symmetric=symmetric)


def test_a_group_size_that_does_not_divide_names_sizes_that_do() -> None:
    with pytest.raises(
        ValueError, match=r"group_size 64 does not divide 96 .* use channel or 4 or 8 or 16 or 32 or 48 or 96"
    ):
        fit_grid(gaussian(2, 96), bits=4, group_size=64)
    with pytest.raises(ValueError, match=r"group_size 64 does not divide 30 input features; use channel"):
        fit_grid(gaussian(2, 30), bits=4, group_size=64)


@pytest.mark.parametrize("group_size", [0, -4, "row", 2.5])
def test_a_group_size_that_is_none_is_refused(group_size: object) -> None:
    with pytest.raises(ValueError, match="group_size must be a positive number, channel or tensor"):
        resolve_group_size(group_size, 64)  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", [1, 9])
def test_impossible_bits_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=f"bits must be 2 to 8, not {bits}"):
        fit_grid(gaussian(2, 8), bits=bits, group_size=8)

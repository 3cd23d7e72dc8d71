"""Blocks of small floats against the specifications' conversion, element by element."""

import math
from typing import Any

import pytest
import torch

from decoct.ops.float_grid import SCALES, FloatGrid, decode_blocks, encode_packed, fit_float_grid
from decoct.ops.minifloat import ELEMENTS
from decoct.ops.packing import unpack_bits
from tests.reference import minifloat as reference
from tests.reference.inputs import gaussian

MX = pytest.mark.parametrize("element", ELEMENTS)
EVERY = pytest.mark.parametrize(("element", "scale_kind"), [(e, k) for e in ELEMENTS for k in SCALES])


def weights(rows: int = 6, cols: int = 64, seed: int = 0) -> torch.Tensor:
    """Rows of different size, one of zeros, a block of zeros, a few outliers."""
    w = gaussian(rows, cols, seed=seed) * gaussian(rows, 1, seed=seed + 1).exp()
    w[:, ::17] *= 6
    w[0] = 0
    w[1, :16] = 0
    return w


def values(w: torch.Tensor, grid: FloatGrid, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    codes = unpack_bits(encode_packed(w, grid), ELEMENTS[grid.element].bits, w.shape[1])
    return decode_blocks(codes, grid, dtype)


def blocks(w: torch.Tensor, size: int) -> list[list[list[float]]]:
    return w.double().reshape(w.shape[0], -1, size).tolist()


@MX
def test_mx_blocks_are_the_specifications(element: str) -> None:
    w = weights()
    grid = fit_float_grid(w, element=element, scale_kind="e8m0", block_size=32)
    assert (grid.scale.dtype, grid.tensor_scale) == (torch.uint8, None)
    exponents = [[reference.shared_exponent(b, element) + 127 for b in row] for row in blocks(w, 32)]
    zeros = w.reshape(6, -1, 32).abs().amax(-1) == 0
    assert torch.equal(grid.scale[~zeros], torch.tensor(exponents, dtype=torch.uint8)[~zeros])
    expected = [[v for b in row for v in reference.mx_block(b, element)] for row in blocks(w, 32)]
    assert values(w, grid).double().tolist() == expected


def test_nvfp4_blocks_are_rounded_twice() -> None:
    w = weights()
    grid = fit_float_grid(w, element="e2m1", scale_kind="e4m3", block_size=16)
    assert grid.tensor_scale is not None
    assert float(grid.tensor_scale) == pytest.approx(float(w.abs().max()) / (6 * 448))
    largest = float(grid.factors().max() * 6)
    assert largest == pytest.approx(float(w.abs().max()))
    scale = float(grid.tensor_scale)
    expected = [[v for b in row for v in reference.nvfp4_block(b, scale)] for row in blocks(w, 16)]
    torch.testing.assert_close(values(w, grid).double(), torch.tensor(expected).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("block_size", ["channel", "tensor", 16])
def test_fp8_puts_the_largest_entry_on_the_largest_number(block_size: int | str) -> None:
    w = weights()
    grid = fit_float_grid(w, element="e4m3", scale_kind="real", block_size=block_size)
    assert grid.scale.dtype == torch.bfloat16
    assert list(grid.scale.shape) == {"channel": [6, 1], "tensor": [1, 1], 16: [6, 4]}[block_size]
    found = values(w, grid)
    lost = (found - w).abs() / w.abs().clamp(min=1e-2 * float(w.abs().max()))
    assert float(lost.max()) < 2**-4 * 1.01
    if block_size == "tensor":
        assert float(grid.scale) == pytest.approx(float(w.abs().max()) / 448, rel=2**-8)


@EVERY
def test_a_searched_scale_is_the_best_of_those_tried(element: str, scale_kind: str) -> None:
    w = weights(seed=5)
    plain, found = (
        fit_float_grid(w, element=element, scale_kind=scale_kind, block_size=16, search=search)
        for search in (False, True)
    )
    losses = {}
    for name, grid in (("plain", plain), ("found", found)):
        losses[name] = (values(w, grid) - w).double().square().reshape(6, -1, 16).sum(-1)
    assert bool((losses["found"] <= losses["plain"] * (1 + 1e-5)).all())
    if scale_kind == "e8m0":
        for i, row in enumerate(blocks(w, 16)):
            for j, block in enumerate(row):
                usual = 2.0 ** reference.shared_exponent(block, element)
                best = min(reference.error(block, element, usual * f) for f in (1.0, 2.0, 0.5))
                assert float(losses["found"][i, j]) == pytest.approx(best, rel=1e-5, abs=1e-12)


@EVERY
@pytest.mark.parametrize("search", [True, False])
def test_zero_is_zero_and_size_does_not_matter(element: str, scale_kind: str, search: bool) -> None:
    setting: dict[str, Any] = {"element": element, "scale_kind": scale_kind, "block_size": 16, "search": search}
    w = weights()
    whole = values(w, fit_float_grid(w, **setting))
    assert not whole[w == 0].any()
    for exponent in (-60, -9, 30):
        scaled = w * 2.0**exponent
        assert torch.equal(values(scaled, fit_float_grid(scaled, **setting)), whole * 2.0**exponent)
    zeros = torch.zeros(3, 32)
    assert not values(zeros, fit_float_grid(zeros, **setting)).any()


@EVERY
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_largest_and_smallest_numbers(element: str, scale_kind: str, dtype: torch.dtype) -> None:
    w = gaussian(3, 32).to(dtype)
    w[1] *= torch.finfo(dtype).tiny
    for share in (0.9, 0.99):
        w[0, 3] = share * torch.finfo(dtype).max
        for search in (False, True):
            try:
                grid = fit_float_grid(w, element=element, scale_kind=scale_kind, block_size=16, search=search)
            except ValueError as error:
                assert "too near the largest" in str(error)  # noqa: PT017 - one of two right outcomes
                continue
            assert bool(torch.isfinite(values(w, grid, dtype)).all())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@EVERY
def test_numbers_that_are_not_finite_are_refused(element: str, scale_kind: str, bad: float) -> None:
    w = weights()
    w[2, 5] = bad
    for block_size in (16, "channel", "tensor"):
        with pytest.raises(ValueError, match="NaN or infinite"):
            fit_float_grid(w, element=element, scale_kind=scale_kind, block_size=block_size)


@EVERY
def test_many_rows_are_worked_in_parts_without_a_seam(element: str, scale_kind: str) -> None:
    w = gaussian(20, 1 << 15)
    w[0, 0] = 9.0  # the largest of all, so that the factor for the whole matrix is known
    setting: dict[str, Any] = {"element": element, "scale_kind": scale_kind, "block_size": 64, "search": True}
    whole = fit_float_grid(w, **setting)
    last = fit_float_grid(torch.cat([w[:1], w[-3:]]), **setting)
    assert torch.equal(whole.scale[-3:], last.scale[1:])
    assert torch.equal(
        encode_packed(w, whole)[-3:],
        encode_packed(w[-3:], FloatGrid(last.scale[1:], last.tensor_scale, element, scale_kind, 64)),
    )

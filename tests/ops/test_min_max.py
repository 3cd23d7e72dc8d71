"""Levels between minimum and maximum: the formula, extremes, and the bits that they take."""

import pytest
import torch

from decoct.ops.min_max import pack_between, unpack_between
from tests.reference.min_max import back


def round_trip(x: torch.Tensor, bits: int) -> torch.Tensor:
    return unpack_between(*pack_between(x, bits), bits, x.shape[-1])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (0.01, 20.0), (300.0, -1000.0)])
def test_it_is_the_formula(bits: int, scale: float, shift: float) -> None:
    x = torch.randn(7, 16, generator=torch.Generator().manual_seed(bits), dtype=torch.float64).mul(scale).add(shift)
    x = x.float()
    expected = torch.tensor([back(row, bits) for row in x.double().tolist()])
    torch.testing.assert_close(round_trip(x, bits), expected, rtol=1e-5, atol=1e-6 * scale)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_no_number_is_further_off_than_half_a_step(bits: int) -> None:
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(0)) + 3
    codes, step, low = pack_between(x, bits)
    off = (unpack_between(codes, step, low, bits, 32) - x).abs().amax(-1)
    # Rounding the minimum and the step to 11 bits may put the extremes a little outside.
    assert bool((off <= 0.5 * step.float() + 2.0**-11 * (low.float().abs() + 2**bits * step.float())).all())


def test_equal_numbers_come_back() -> None:
    x = torch.tensor([[0.0] * 8, [1.5] * 8, [-7.0] * 8])
    assert torch.equal(round_trip(x, 2), x)


def test_what_float16_cannot_hold_becomes_the_largest_that_it_can() -> None:
    found = round_trip(torch.tensor([[-1e30, 0.0, 1.0, 1e30]]), 8)
    assert bool(torch.isfinite(found).all())
    assert float(found[0, 0]) == -65504


def test_its_bytes() -> None:
    codes, step, low = pack_between(torch.randn(3, 5, 32), 3)
    assert codes.shape == (3, 5, 12)
    assert (codes.nbytes, step.nbytes, low.nbytes) == (3 * 5 * 12, 30, 30)

"""Levels between minimum and maximum: the formula, extremes, and the bits that they take."""

import pytest
import torch

from decoct.ops.min_max import (
    pack_between,
    pack_by_channel,
    pack_by_token,
    unpack_between,
    unpack_by_channel,
    unpack_by_token,
)
from tests.reference.kvquant import held
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
    levels = torch.tensor([0.0, 0.3, 0.7, 1.0])  # a span that is twice what float16 holds
    codes, step, low = pack_between(torch.tensor([[-1e30, 0.0, 1.0, 1e30]]), 2, levels)
    assert bool(torch.isfinite(unpack_between(codes, step, low, 2, 4, levels)).all())


def test_its_bytes() -> None:
    codes, step, low = pack_between(torch.randn(3, 5, 32), 3)
    assert codes.shape == (3, 5, 12)
    assert (codes.nbytes, step.nbytes, low.nbytes) == (3 * 5 * 12, 30, 30)


LEVELS = {None: None, "learned": torch.tensor([0.02, 0.1, 0.3, 0.38, 0.5, 0.75, 0.8, 0.99])}


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("outliers", [0, 1, 5, 40])
def test_levels_and_outliers_are_the_formula(levels: str | None, outliers: int) -> None:
    """A vector is all channels of a head in a group of tokens, or a token's in all heads. 40: whole groups."""
    x = torch.randn(2, 2, 16, 24, generator=torch.Generator().manual_seed(outliers)).pow(3)
    table = LEVELS[levels]
    plain = None if table is None else table.double().tolist()
    keys = unpack_by_channel(pack_by_channel(x, 8, 3, table, outliers), 8, 3, table)
    values = unpack_by_token(pack_by_token(x, 8, 3, table, outliers), 8, 3, table)
    for start in (0, 8):
        part = x[1, 0, start : start + 8].double()
        expected = torch.tensor(held(part.T.tolist(), 3, plain, outliers)).T
        torch.testing.assert_close(keys[1, 0, start : start + 8], expected.float(), rtol=1e-5, atol=1e-6)
    for token in (0, 11):
        groups = x[1, :, token].double().reshape(-1, 8)
        expected = torch.tensor(held(groups.tolist(), 3, plain, outliers)).reshape(2, 24)
        torch.testing.assert_close(values[1, :, token], expected.float(), rtol=1e-5, atol=1e-6)


def test_outliers_pay_where_a_few_entries_stand_out() -> None:
    x = torch.randn(1, 2, 32, 64, generator=torch.Generator().manual_seed(0))
    x.view(-1)[torch.randperm(x.numel(), generator=torch.Generator().manual_seed(1))[:40]] *= 30
    for pack, unpack in ((pack_by_channel, unpack_by_channel), (pack_by_token, unpack_by_token)):
        errors = [float((unpack(pack(x, 32, 4, None, n), 32, 4) - x).square().sum()) for n in (0, 20)]
        assert errors[1] < 0.2 * errors[0]


def test_outliers_bytes_and_positions() -> None:
    """A number takes two bytes, its position one among up to 256 entries and two beyond, up to the last of 65536."""
    x = torch.randn(2, 3, 32, 64, generator=torch.Generator().manual_seed(0))
    keys, values = pack_by_channel(x, 32, 4, None, 20), pack_by_token(x, 32, 4, None, 2)
    assert keys["outliers"].nbytes == keys["positions"].nbytes == 2 * 3 * 20 * 2
    assert (values["outliers"].nbytes, values["positions"].nbytes) == (2 * 32 * 2 * 2, 2 * 32 * 2)
    assert values["outliers"].shape == (2, 1, 32, 2)
    x = torch.zeros(1, 1, 256, 256)
    x[0, 0, 255, 255], x[0, 0, 0, 128] = 77.0, -5.0
    assert torch.equal(unpack_by_channel(pack_by_channel(x, 256, 2, None, 2), 256, 2), x)
    x[0, 0, 0, 128] = 1e30
    assert float(unpack_by_channel(pack_by_channel(x, 256, 2, None, 2), 256, 2).max()) == 65504

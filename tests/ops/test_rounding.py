"""Learned rounding against autograd's straight-through gradients in float64."""

import pytest
import torch

from decoct.ops.rounding import clipped_codes, grid_gradients, rounding_gradients
from tests.reference.inputs import gaussian
from tests.reference.rounding import gradients, on_grid

ROWS, GROUPS, SIZE = 5, 3, 16


@pytest.mark.parametrize("asymmetric", [False, True])
def test_gradients_against_autograd(asymmetric: bool) -> None:
    w, g = 1.4 * gaussian(ROWS, GROUPS, SIZE, seed=1), gaussian(ROWS, GROUPS, SIZE, seed=2)
    offset = 0.3 * gaussian(ROWS, GROUPS, SIZE, seed=4)
    scale = 0.3 + 0.1 * gaussian(ROWS, GROUPS, 1, seed=3).abs()
    low = gaussian(ROWS, GROUPS, 1, seed=5).round() - 3 if asymmetric else torch.full((ROWS, GROUPS, 1), -4.0)
    high = low + 7
    scale[0] *= -1
    position = w / scale + offset
    clipped = clipped_codes(position, low, high)
    assert 0 < int((clipped != position.round()).sum()) < clipped.numel() / 2, "both cases must occur"
    assert bool(((clipped >= low) & (clipped <= high)).all())
    expected = gradients(g, w, offset, scale, low, high)
    for found, exact in zip(rounding_gradients(g, w / scale, offset, scale, low, high), expected, strict=True):
        assert torch.allclose(found.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("one_scale", [False, True])
def test_gradients_of_a_grid_against_autograd(one_scale: bool) -> None:
    bits, scales = 3, (1, 1, 1) if one_scale else (ROWS, GROUPS, 1)
    w, g = 1.2 * gaussian(ROWS, GROUPS, SIZE, seed=1), gaussian(ROWS, GROUPS, SIZE, seed=2)
    log_scale = 0.1 * gaussian(*scales, seed=3) - 1
    zero = 3.4 + 0.8 * gaussian(*scales, seed=5)
    exact = [each.double().requires_grad_() for each in (w, log_scale, zero)]
    by_w, by_scale, by_zero = torch.autograd.grad((g.double() * on_grid(*exact, bits)).sum(), exact)
    scale, middle = log_scale.exp(), zero.round()
    found = grid_gradients(g, w / scale, scale, -middle, 2**bits - 1 - middle)
    clipped = int((found.position == 0).sum())
    assert 0 < clipped < w.numel() / 2, "both cases must occur"
    for mine, expected in zip(found, (by_w * scale, by_scale, by_zero), strict=True):
        assert mine.shape == expected.shape
        assert torch.allclose(mine.double(), expected, rtol=1e-4, atol=1e-4)


def test_arguments_are_left_alone() -> None:
    g, position = (gaussian(ROWS, GROUPS, SIZE, seed=n) for n in range(2))
    one = torch.ones(ROWS, GROUPS, 1)
    given = (g, position, one)
    before = [each.clone() for each in given]
    clipped_codes(position, -2 * one, one)
    rounding_gradients(g, position, position, one, -2 * one, one)
    grid_gradients(*given, -2 * one, one)
    assert all(torch.equal(each, old) for each, old in zip(given, before, strict=True))

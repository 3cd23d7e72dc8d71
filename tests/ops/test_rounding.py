"""Learned rounding against autograd's straight-through gradients in float64."""

import pytest
import torch

from decoct.ops.rounding import clipped_codes, rounding_gradients
from tests.reference.inputs import gaussian
from tests.reference.rounding import gradients

ROWS, GROUPS, SIZE = 5, 3, 16


@pytest.mark.parametrize("asymmetric", [False, True])
def test_gradients_against_autograd(asymmetric: bool) -> None:
    position, g = 4 * gaussian(ROWS, GROUPS, SIZE, seed=1), gaussian(ROWS, GROUPS, SIZE, seed=2)
    scale = 0.3 + 0.1 * gaussian(ROWS, GROUPS, 1, seed=3).abs()
    low = gaussian(ROWS, GROUPS, 1, seed=5).round() - 3 if asymmetric else torch.full((ROWS, GROUPS, 1), -4.0)
    high = low + 7
    clipped = clipped_codes(position, low, high)
    assert 0 < int((clipped != position.round()).sum()) < clipped.numel() / 2, "both cases must occur"
    assert bool(((clipped >= low) & (clipped <= high)).all())
    expected = gradients(g, position, scale, low, high)
    for found, exact in zip(rounding_gradients(g, position, scale, low, high), expected, strict=True):
        assert torch.allclose(found.double(), exact, rtol=1e-4, atol=1e-4)


def test_arguments_are_left_alone() -> None:
    g, position = (gaussian(ROWS, GROUPS, SIZE, seed=n) for n in range(2))
    one = torch.ones(ROWS, GROUPS, 1)
    given = (g, position, one)
    before = [each.clone() for each in given]
    clipped_codes(position, -2 * one, one)
    rounding_gradients(*given, -2 * one, one)
    assert all(torch.equal(each, old) for each, old in zip(given, before, strict=True))

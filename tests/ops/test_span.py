"""Grids given by their ends against autograd's straight-through gradients in float64."""

import pytest
import torch

from decoct.ops.rounding import clipped_codes, grid_gradients
from decoct.ops.span import span_gradients, span_grid
from tests.reference.inputs import gaussian
from tests.reference.rounding import on_span

ROWS, GROUPS, SIZE, BITS = 5, 3, 16, 3


@pytest.mark.parametrize("symmetric", [True, False])
def test_values_and_gradients_of_the_ends(symmetric: bool) -> None:
    w, g = gaussian(ROWS, GROUPS, SIZE, seed=1), gaussian(ROWS, GROUPS, SIZE, seed=2)
    high = 1.0 + 0.2 * gaussian(ROWS, GROUPS, 1, seed=3)
    low = None if symmetric else 1.1 + 0.2 * gaussian(ROWS, GROUPS, 1, seed=4)
    exact = [each.double().requires_grad_() for each in (high, low) if each is not None]
    wanted = on_span(w.double(), exact[0], None if symmetric else exact[1], BITS)
    expected = torch.autograd.grad((g.double() * wanted).sum(), exact)
    scale, zero = span_grid(high, low, BITS)
    limits = -zero, 2**BITS - 1 - zero
    assert torch.allclose((clipped_codes(w / scale, *limits) * scale).double(), wanted.detach(), atol=1e-6)
    by = grid_gradients(g, w / scale, scale, *limits)
    found = span_gradients(by.log_scale / scale, by.zero, high, low, BITS)
    for mine, theirs in zip(found, expected, strict=False):
        assert torch.allclose(mine.double(), theirs, rtol=1e-4, atol=1e-4)
    assert not symmetric or not found[1].any()


def test_the_zero_point_is_a_code() -> None:
    high, low = torch.tensor([[[0.0]], [[1.0]], [[1.0]]]), torch.tensor([[[2.0]], [[0.0]], [[1.0]]])
    scale, zero = span_grid(high, low, 2)
    assert zero.flatten().tolist() == [3, 0, 2]
    assert torch.allclose(scale.flatten(), torch.tensor([2 / 3, 1 / 3, 2 / 3]))

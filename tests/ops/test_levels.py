"""Rounding to levels against loops in float64 written from the papers' formulas."""

import math

import pytest
import torch

from decoct.ops.levels import fit_step, level_codes, round_to_levels
from tests.reference.inputs import gaussian

GRIDS = {
    "lsq 2 bit": (4, 2.0, False), "lsq 4 bit": (16, 8.0, False), "seq 2 bit": (4, 1.5, True),
    "ternary": (3, 1.0, True), "binary": (2, 0.5, True),
}  # fmt: skip


def reference(w: float, step: float, zero: float, levels: int, wide: bool) -> tuple[float, float, float]:
    """Value, and its derivatives by weight and step with rounding's taken as 1 (LSQ, equations 1 to 3)."""
    low, high, place = -zero, levels - 1 - zero, w / step
    margin = 0.5 if wide else 0.0
    nearest = round(place + zero) - zero  # to even, as torch rounds
    value = min(max(nearest, low), high)
    if place < low - margin:
        return value * step, 0.0, low
    if place > high + margin:
        return value * step, 0.0, high
    return value * step, 1.0, value - place


@pytest.mark.parametrize("name", GRIDS)
def test_against_the_formula(name: str) -> None:
    levels, zero, wide = GRIDS[name]
    w = gaussian(3, 8, seed=1).requires_grad_()
    step = torch.tensor([[0.6, 0.8], [1.1, 0.5], [0.9, 0.3]], requires_grad=True)
    outer = gaussian(3, 8, seed=2)
    found = round_to_levels(w, step, zero, levels, wide=wide)
    (found * outer).sum().backward()
    assert w.grad is not None
    assert step.grad is not None
    of_step = torch.zeros(3, 2, dtype=torch.float64)
    for i in range(3):
        for j in range(8):
            size = float(step[i, j // 4].detach())
            value, slope, by_step = reference(float(w[i, j].detach()), size, zero, levels, wide)
            assert float(found[i, j].detach()) == pytest.approx(value, rel=1e-6)
            assert float(w.grad[i, j]) == slope * float(outer[i, j])
            of_step[i, j // 4] += by_step * float(outer[i, j])
    torch.testing.assert_close(step.grad.double(), of_step, rtol=1e-5, atol=1e-6)


def test_seq_is_the_papers_grid() -> None:
    """ParetoQ: alpha·(round(clip(w/alpha, -1, 1)·k/2 - 0.5) + 0.5)·2/k for k levels; three: round(1.5·clip)/1.5."""
    w = gaussian(1, 64, seed=3)
    alpha = 1.3
    for i in range(64):
        x = min(max(float(w[0, i]) / alpha, -0.999), 0.999)
        two = (round(x * 2 - 0.5) + 0.5) / 2 * alpha
        three = round(x * 1.5) / 1.5 * alpha
        one = math.copysign(1.0, x) * alpha
        for wanted, levels, zero, step in (
            (two, 4, 1.5, alpha / 2),
            (three, 3, 1.0, alpha / 1.5),
            (one, 2, 0.5, 2 * alpha),
        ):
            got = round_to_levels(w[:, i : i + 1], torch.tensor([[step]]), zero, levels, wide=True)
            assert float(got) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("name", GRIDS)
def test_steps_fit(name: str) -> None:
    """No step of a fine raster is much better, and codes are those of the values."""
    levels, zero, wide = GRIDS[name]
    w = gaussian(4, 32, seed=5)
    step = fit_step(w, 16, zero, levels, torch.float32)
    assert step.shape == (4, 2)

    def errors(step: torch.Tensor) -> torch.Tensor:
        return (round_to_levels(w, step, zero, levels, wide=wide) - w).square().reshape(4, 2, 16).sum(-1)

    best = torch.stack([errors(torch.full((4, 2), size)) for size in torch.linspace(0.02, 6, 600).tolist()]).amin(0)
    assert bool((errors(step) <= 1.1 * best + 1e-6).all())
    codes = level_codes(w, step, zero, levels).float()
    values = (codes.reshape(4, 2, 16) - zero) * step.unsqueeze(-1)
    torch.testing.assert_close(values.reshape(4, 32), round_to_levels(w, step, zero, levels, wide=wide))


def test_zeros_and_numbers_that_are_none() -> None:
    assert bool((fit_step(torch.zeros(2, 8), 4, 1.5, 4, torch.float16) > 0).all())
    with pytest.raises(ValueError, match="the checkpoint is damaged"):
        fit_step(torch.full((2, 8), torch.nan), 4, 1.5, 4, torch.float16)

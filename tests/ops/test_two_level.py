"""Grids with scales of two levels, and the leave-one-out test, against group-by-group loops."""

import pytest
import torch

from decoct.ops.grid import dequantize, fit_grid, quantize
from decoct.ops.outliers import leave_one_out_gain
from decoct.ops.two_level import Scales, fit_two_level
from tests.reference import spqr as reference
from tests.reference.inputs import gaussian

ROWS, COLS, SIZE = 10, 24, 8


def setting(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights with outliers and rows of different size, which of them are used, and the columns' importance."""
    w = gaussian(ROWS, COLS, seed=seed) * gaussian(ROWS, 1, seed=seed + 1).exp()
    w[1, 3], w[4, 20] = 9, -7
    used = torch.rand(ROWS, COLS, generator=torch.Generator().manual_seed(seed)) < 0.9
    return w, used, gaussian(COLS, seed=seed + 2).exp()


def groups(w: torch.Tensor, used: torch.Tensor, importance: torch.Tensor, bits: int) -> list[list[reference.Group]]:
    return reference.groups(w.tolist(), used.tolist(), importance.tolist(), bits, SIZE)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("masked", [False, True])
def test_leaving_one_out(bits: int, masked: bool) -> None:
    w, used, importance = setting(bits)
    used = used if masked else torch.ones_like(used)
    found = leave_one_out_gain(w, importance, bits=bits, group_size=SIZE, survivors=used if masked else None)
    expected = torch.tensor(reference.gains(groups(w, used, importance, bits)), dtype=torch.float64)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-5)
    assert not found[~used].any()


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize(("scale_bits", "block"), [(3, 4), (1, 1), (2, 10), (4, 16)])
def test_base_step_codes_and_zeros_are_the_references(bits: int, scale_bits: int, block: int) -> None:
    w, used, importance = setting(bits)
    w[4:8, 8:16] = 0  # a block's group of zeros
    w[9, :8] = 0
    grid, scales = fit_two_level(
        w, used, importance, bits=bits, group_size=SIZE, scale_bits=scale_bits, rows_per_block=block,
        scale_dtype=torch.bfloat16,
    )  # fmt: skip
    table = groups(w, used, importance, bits)
    assert grid.zero is not None
    assert scales.base.shape == scales.step.shape == (-(-ROWS // block), COLS // SIZE)
    assert torch.equal(grid.scale, scales.values())
    for i, row in enumerate(table):
        for g, group in enumerate(row):
            first = i // block * block
            own = [table[k][g].ends() for k in range(first, min(first + block, ROWS))]
            base, step = reference.second_level(
                [(high - low) / group.top for low, high in own], scale_bits, torch.bfloat16
            )
            assert float(scales.base[i // block, g]) == pytest.approx(base, rel=1e-6)
            assert float(scales.step[i // block, g]) == pytest.approx(step, rel=0.01, abs=1e-6 * base)
            stored = float(scales.step[i // block, g])
            code, zero = reference.best_code(group, base, stored, scale_bits)
            assert float(grid.scale[i, g]) == pytest.approx(base + int(scales.codes[i, g]) * stored, rel=1e-6)
            found = group.error(float(grid.scale[i, g]), int(grid.zero[i, g]))
            assert found <= group.error(base + code * stored, zero) * (1 + 1e-4) + 1e-9


def test_it_loses_little_against_scales_of_16_bits() -> None:
    w = gaussian(64, 256)
    every, one = torch.ones_like(w, dtype=torch.bool), torch.ones(256)
    grid, _ = fit_two_level(
        w, every, one, bits=4, group_size=16, scale_bits=3, rows_per_block=16, scale_dtype=torch.bfloat16
    )
    full = fit_grid(w, bits=4, group_size=16, symmetric=False, search=True)
    found, least = ((dequantize(quantize(w, g), g) - w).square().sum() for g in (grid, full))
    assert found < 1.1 * least


def test_scales_of_the_last_shorter_block() -> None:
    scales = Scales(
        torch.tensor([[0], [1], [2]], dtype=torch.uint8),
        torch.tensor([[1.0], [5.0]]),
        torch.tensor([[0.5], [2.0]]),
        2,
        2,
    )
    assert scales.values().tolist() == [[1.0], [1.5], [9.0]]


def test_weights_too_large_for_the_scales_are_refused() -> None:
    w = torch.full((2, 8), 1e38)
    settings = {"bits": 2, "group_size": 8, "scale_bits": 3, "rows_per_block": 2}
    with pytest.raises(ValueError, match=r"too large for scales in torch\.float16"):
        fit_two_level(w, w > 0, torch.ones(8), scale_dtype=torch.float16, **settings)
    with pytest.raises(ValueError, match="NaN or infinite"):
        fit_two_level(w * 10, w > 0, torch.ones(8), scale_dtype=torch.float16, **settings)

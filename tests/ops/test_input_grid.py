"""Rounding inputs, against the slow reference."""

from typing import Any

import pytest
import torch

from decoct.ops.input_grid import InputGrid, check_input_grid, fixed_scale, input_group, integer_inputs, round_inputs
from tests.reference.input_grids import token
from tests.reference.inputs import correlated, gaussian

WIDTH = 64
GRIDS: dict[str, InputGrid] = {
    **{f"int{bits}": InputGrid(bits=bits) for bits in range(2, 9)},
    "int4-clipped": InputGrid(bits=4, clip_ratio=0.9),
    "int8-groups": InputGrid(group_size=16),
    "int8-asymmetric": InputGrid(symmetric=False),
    "int4-asymmetric-groups-clipped": InputGrid(bits=4, symmetric=False, group_size=32, clip_ratio=0.9),
    "int8-tensor": InputGrid(group_size="tensor"),
    "fp8": InputGrid("fp8"),
    "fp8-groups": InputGrid("fp8", group_size=32),
    "fp8-tensor": InputGrid("fp8", group_size="tensor"),
    "mxfp8": InputGrid("mxfp8", group_size=32),
    "mxfp6": InputGrid("mxfp6", group_size=32),
    "mxfp4": InputGrid("mxfp4", group_size=32),
    "nvfp4": InputGrid("nvfp4", group_size=16),
}
EVERY = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())


def inputs() -> torch.Tensor:
    """Tokens of different sizes, one of them zero, one with a group of zeros."""
    x = correlated(12, WIDTH) * gaussian(12, 1, seed=5).exp()
    x[3] = 0
    x[4, :32] = 0
    return x


def scale_for(grid: InputGrid, x: torch.Tensor, part: float = 1.0) -> torch.Tensor | None:
    return fixed_scale(grid, part * float(x.abs().max())) if grid.needs_scale else None


def reference(x: torch.Tensor, grid: InputGrid, scale: torch.Tensor | None, kept: tuple[int, ...] = ()) -> torch.Tensor:
    rows = [
        token(
            row, grid.format, input_group(grid, WIDTH), bits=grid.bits, symmetric=grid.symmetric, clip=grid.clip_ratio,
            scale=None if scale is None else float(scale), kept=kept,
        )
        for row in x.double().tolist()
    ]  # fmt: skip
    return torch.tensor(rows, dtype=torch.float64)


def mostly_equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Float32 may round a near tie the other way."""
    near = torch.isclose(found.double(), expected, rtol=1e-5, atol=1e-9)
    assert float(near.double().mean()) > 0.98


@EVERY
@pytest.mark.parametrize("kept", [(), (3, 17, 40)], ids=["all", "kept"])
def test_against_the_reference(grid: InputGrid, kept: tuple[int, ...]) -> None:
    x = inputs()
    scale = scale_for(grid, x, 0.7)  # calibrated on smaller inputs: the largest are clipped
    index = torch.tensor(kept) if kept else None
    found = round_inputs(x, grid, scale, index)
    mostly_equal(found, reference(x, grid, scale, kept))
    assert torch.equal(found[:, list(kept)], x[:, list(kept)])
    assert not found[3].any()


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_token_does_not_depend_on_its_batch(grid: InputGrid, dtype: torch.dtype) -> None:
    x = inputs().to(dtype)
    scale = scale_for(grid, x)
    whole = round_inputs(x.reshape(3, 4, WIDTH), grid, scale)
    assert whole.dtype == dtype
    assert whole.shape == (3, 4, WIDTH)
    for i, row in enumerate(x):
        assert torch.equal(round_inputs(row.reshape(1, WIDTH), grid, scale)[0], whole.reshape(-1, WIDTH)[i])


@EVERY
def test_no_tokens_are_no_tokens(grid: InputGrid) -> None:
    assert round_inputs(torch.zeros(0, WIDTH), grid, scale_for(grid, inputs())).shape == (0, WIDTH)


@EVERY
def test_the_error_is_that_of_the_bits(grid: InputGrid) -> None:
    x = gaussian(200, WIDTH)
    found = round_inputs(x, grid, scale_for(grid, x))
    error = float((found - x).square().sum() / x.square().sum())
    element = {"int": grid.bits, "fp8": 6, "mxfp8": 6, "mxfp6": 5, "mxfp4": 4, "nvfp4": 4}[grid.format]
    assert 0 < error < 12 * 4.0**-element


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_counts_as_the_identity_for_gradients(grid: InputGrid, dtype: torch.dtype) -> None:
    x = inputs().to(dtype).requires_grad_()
    scale = scale_for(grid, x.detach(), 0.3)  # most inputs are clipped
    y = round_inputs(x, grid, scale)
    (found,) = torch.autograd.grad((y * 3).sum(), x)
    assert torch.equal(found, torch.full_like(x, 3.0))
    assert torch.equal(y.detach(), round_inputs(x.detach(), grid, scale))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("size", ["token", "tensor"])
def test_codes_times_scales_are_the_rounded_inputs(bits: int, size: str) -> None:
    x, grid = inputs(), InputGrid(bits=bits, group_size=size)
    scale = scale_for(grid, x)
    codes, step = integer_inputs(x, grid, scale)
    assert codes.dtype == torch.int8
    assert step.shape == (x.shape[0], 1)
    assert torch.equal(codes.float() * step, round_inputs(x, grid, scale))


def test_values_that_are_not_finite_show() -> None:
    for name, grid in GRIDS.items():
        x = inputs()
        x[2, 5] = torch.nan
        assert bool(round_inputs(x, grid, scale_for(grid, inputs()))[2].isnan().any()), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "fp9"}, "format must be one of int, fp8"),
        ({"bits": 1}, "bits must be 2 to 8, not 1"),
        ({"group_size": "channel"}, "group_size must be a positive number, token or tensor, not 'channel'"),
        ({"group_size": 0}, "group_size must be"),
        ({"clip_ratio": 0.0}, "clip_ratio must be above 0"),
        ({"format": "fp8", "symmetric": False}, "fp8 has no zero points"),
        ({"symmetric": False, "group_size": "tensor"}, "use symmetric: true, or token"),
        ({"format": "mxfp4"}, "a scale for each block"),
    ],
)
def test_what_no_input_can_be_rounded_to_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_input_grid(InputGrid(**settings))


def test_a_group_that_does_not_divide_names_those_that_do() -> None:
    with pytest.raises(ValueError, match=r"group_size 32 does not divide 48 input features; use token or 4 or"):
        input_group(InputGrid(group_size=32), 48)

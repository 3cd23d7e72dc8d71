"""Rounding what a matrix is multiplied with: a grid for each token, or for groups of its features, chosen as it comes.

Weights are rounded once and may be searched over; inputs are rounded in every call, so their scales follow from the
extremes alone. An integer stands for `(code - zero) * scale`, a floating-point element for `element * scale`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int, Int8
from torch import Tensor

from decoct.ops.float_grid import FORMATS
from decoct.ops.grid import resolve_group_size
from decoct.ops.minifloat import ELEMENTS, decode, encode, exponent_of, power_of_two, rounded

_E8M0_RANGE = (-126, 127)  # exponents that are normal numbers in float32
_E4M3 = ELEMENTS["e4m3"]

INPUT_FORMATS = ("int", *FORMATS)
"""What inputs can be rounded to: integers, or one of the floating-point formats."""


@dataclass(frozen=True, slots=True)
class InputGrid:
    """How inputs are rounded.

    Attributes:
        format: one of `INPUT_FORMATS`.
        bits: 2 to 8, of integers; the other formats have their own.
        group_size: consecutive features of a token that share a scale; "token": all of them; "tensor": one scale for
            everything, which has to be given because it was chosen on other inputs.
        symmetric: whether the integers' grid lies around zero.
        clip_ratio: part of the extremes that the grid covers; what lies beyond is clipped (QuaRot takes 0.9 at 4 bits).
    """

    format: str = "int"
    bits: int = 8
    group_size: int | str = "token"
    symmetric: bool = True
    clip_ratio: float = 1.0

    @property
    def needs_scale(self) -> bool:
        """Whether a number chosen on other inputs is needed: the scale, or the factor of NVFP4's scales."""
        return self.group_size == "tensor" or self.format == "nvfp4"

    @property
    def largest(self) -> float:
        """What the scale puts the largest input onto.

        Of symmetric integers it is the largest code, as in the papers' and engines' kernels. Half a code more, as for
        weights, would put every token's largest input, if negative, onto a tie: the last bit of a sum would decide it.
        """
        return 2 ** (self.bits - 1) - 1 if self.format == "int" else ELEMENTS[FORMATS[self.format][0]].largest


def check_input_grid(grid: InputGrid) -> None:
    """Refuse a grid that no input can be rounded to.

    Raises:
        ValueError: bits, format, group size or clip out of range, or settings that do not go together.
    """
    if grid.format not in INPUT_FORMATS:
        raise ValueError(f"format must be one of {', '.join(INPUT_FORMATS)}, not {grid.format!r}")
    if not 2 <= grid.bits <= 8:
        raise ValueError(f"bits must be 2 to 8, not {grid.bits}")
    if grid.group_size not in ("token", "tensor") and (not isinstance(grid.group_size, int) or grid.group_size < 1):
        raise ValueError(f"group_size must be a positive number, token or tensor, not {grid.group_size!r}")
    if not 0 < grid.clip_ratio <= 1:
        raise ValueError(f"clip_ratio must be above 0 and at most 1, not {grid.clip_ratio}")
    if not grid.symmetric and grid.format != "int":
        raise ValueError(f"{grid.format} has no zero points; leave symmetric at true")
    if not grid.symmetric and grid.group_size == "tensor":
        raise ValueError("one scale for everything is chosen from the largest |x|; use symmetric: true, or token")
    scaled_in_blocks = grid.format != "int" and FORMATS[grid.format][1] != "real"
    if scaled_in_blocks and not isinstance(grid.group_size, int):
        raise ValueError(f"{grid.format} has a scale for each block; leave group_size out, or give a number")


def input_group(grid: InputGrid, width: int) -> int:
    """Features that share a scale, of inputs `width` wide.

    Raises:
        ValueError: the group size does not divide the width.
    """
    if grid.group_size in ("token", "tensor"):
        return width
    try:
        return resolve_group_size(grid.group_size, width)
    except ValueError as error:
        raise ValueError(str(error).replace("channel", "token")) from None


def fixed_scale(grid: InputGrid, peak: float) -> Float[Tensor, "1"]:
    """The number that `needs_scale` asks for, given the largest |x| that is expected.

    Args:
        grid: one that needs it.
        peak: finite, not negative.
    """
    units = grid.largest * (_E4M3.largest if grid.format == "nvfp4" else 1.0)
    least = torch.finfo(torch.float32).tiny
    return torch.tensor([max(peak * grid.clip_ratio / units, least) if peak > 0 else 1.0], dtype=torch.float32)


def round_inputs(
    x: Float[Tensor, "*tokens in"],
    grid: InputGrid,
    scale: Float[Tensor, "1"] | None = None,
    kept: Int[Tensor, " kept"] | None = None,
) -> Float[Tensor, "*tokens in"]:
    """What the rounded inputs stand for, in the inputs' dtype.

    Where a gradient is wanted, rounding counts as the identity (the straight-through estimate).

    Args:
        x: any float dtype; a token's result depends on that token alone.
        grid: how to round.
        scale: what `fixed_scale` gave, for a grid that needs it.
        kept: features that stay as they are and do not count for the scales.
    """
    width = x.shape[-1]
    wide = x.detach().float()
    if kept is not None:
        wide = wide.index_fill(-1, kept, 0.0)
    size = input_group(grid, width)
    groups = wide.reshape(*x.shape[:-1], width // size, size)
    if grid.format == "int":
        values = _integers(groups, grid, scale)
    else:
        element = ELEMENTS[FORMATS[grid.format][0]]
        step = _float_step(groups, grid, scale)
        values = rounded(groups / step, element).mul_(step)
    found = values.flatten(-2).to(x.dtype)
    if kept is not None:
        found[..., kept] = x.detach()[..., kept]
    return _StraightThrough.apply(x, found) if x.requires_grad else found  # type: ignore[no-untyped-call]


class _StraightThrough(torch.autograd.Function):
    """Rounded inputs, exactly; their gradient is that of the inputs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, found: Tensor) -> Tensor:  # noqa: ARG004 - torch's signature
        return found.view_as(found)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004 - torch's signature
        return grads[0], None


def integer_inputs(
    x: Float[Tensor, "tokens in"], grid: InputGrid, scale: Float[Tensor, "1"] | None = None
) -> tuple[Int8[Tensor, "tokens in"], Float[Tensor, "tokens 1"]]:
    """Codes counted from zero, and each token's scale: what an integer product needs.

    Args:
        x: any float dtype.
        grid: symmetric integers with one scale a token, or in all.
        scale: as for `round_inputs`.
    """
    wide = x.float()
    step = _step(wide.abs().amax(-1, keepdim=True), grid) if scale is None else scale.expand(x.shape[0], 1)
    half = 2 ** (grid.bits - 1)
    return (wide / step).round_().clamp_(-half, half - 1).to(torch.int8), step


def _integers(groups: Tensor, grid: InputGrid, scale: Tensor | None) -> Tensor:
    """Values of the nearest codes of groups [..., groups, size]."""
    top = 2**grid.bits - 1
    if grid.symmetric:
        half = 2 ** (grid.bits - 1)
        step = _step(groups.abs().amax(-1, keepdim=True), grid) if scale is None else scale
        return (groups / step).round_().clamp_(-half, half - 1).mul_(step)
    low, high = groups.amin(-1, keepdim=True).clamp_(max=0), groups.amax(-1, keepdim=True).clamp_(min=0)
    step = (high - low) * (grid.clip_ratio / top)
    step = torch.where(step > 0, step, 1.0)  # zero must stay on the grid, so an empty span is one of zeros
    zero = (low * -grid.clip_ratio / step).round_().clamp_(0, top)
    return (groups / step).round_().add_(zero).clamp_(0, top).sub_(zero).mul_(step)


def _step(peak: Tensor, grid: InputGrid) -> Tensor:
    """The real scale that puts the largest magnitude onto the largest number."""
    step = peak * grid.clip_ratio / grid.largest
    return torch.where(step > 0, step, 1.0)


def _float_step(groups: Tensor, grid: InputGrid, scale: Tensor | None) -> Tensor:
    """Scales [..., groups, 1] of floating-point elements, as the formats' authors choose them."""
    element, kind, _ = FORMATS[grid.format]
    peak = groups.abs().amax(-1, keepdim=True)
    if kind == "e8m0":
        clipped = peak * grid.clip_ratio
        exponent = (exponent_of(clipped.contiguous()) - ELEMENTS[element].highest).clamp_(*_E8M0_RANGE)
        return torch.where(clipped > 0, power_of_two(exponent), 1.0)
    if kind == "e4m3":
        assert scale is not None
        codes = encode(_step(peak, grid) / scale, _E4M3).clamp_(min=1)  # a scale of zero would lose the block
        return decode(codes, _E4M3) * scale
    return _step(peak, grid) if scale is None else scale

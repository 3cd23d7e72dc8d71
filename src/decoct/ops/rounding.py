"""Rounding whose result is learned: codes and scales as functions of real numbers, and gradients through both.

A weight is `scale * code`, `code = clip(round(position))`. Rounding has no gradient of its own, so its result is taken
to follow its argument ("straight-through", arXiv 1308.3432), except where it is clipped.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


def clipped_codes(
    position: Float[Tensor, "rows groups size"],
    low: Float[Tensor, "rows groups 1"],
    high: Float[Tensor, "rows groups 1"],
) -> Float[Tensor, "rows groups size"]:
    """The nearest code of each position (where a weight lies between codes)."""
    return position.round().clamp_(low, high)


def rounding_gradients(
    gradient: Float[Tensor, "rows groups size"],
    center: Float[Tensor, "rows groups size"],
    offset: Float[Tensor, "rows groups size"],
    scale: Float[Tensor, "rows groups 1"],
    low: Float[Tensor, "rows groups 1"],
    high: Float[Tensor, "rows groups 1"],
) -> tuple[Float[Tensor, "rows groups size"], Float[Tensor, "rows groups 1"]]:
    """Gradients of value = scale · clip(round(w / scale + offset)) by `offset` and by `scale`.

    Args:
        gradient: of the loss by the values.
        center: w / scale.
        offset: what is added to it before it is rounded.
        scale: one for each group.
        low: the least code.
        high: the greatest code.
    """
    rounded = (center + offset).round_()
    code = rounded.clamp(low, high)
    of_offset = (gradient * scale).mul_(code == rounded)
    of_scale = code.mul_(gradient).sum(-1, keepdim=True) - (of_offset * center).sum(-1, keepdim=True) / scale
    return of_offset, of_scale


class GridGradients(NamedTuple):
    """Gradients of a loss by everything that makes up weights on a grid, see `grid_gradients`.

    Attributes:
        position: by `position`, [rows, groups, size].
        log_scale: by the scale's logarithm, in the scale's shape.
        zero: by the zero point, in the scale's shape.
    """

    position: Tensor
    log_scale: Tensor
    zero: Tensor


def grid_gradients(
    gradient: Float[Tensor, "rows groups size"],
    position: Float[Tensor, "rows groups size"],
    scale: Float[Tensor, "scale_rows groups 1"],
    low: Float[Tensor, "scale_rows groups 1"],
    high: Float[Tensor, "scale_rows groups 1"],
) -> GridGradients:
    """Gradients where the scale also decides where weights lie: value = scale · clip(round(w / scale)).

    A weight that is not clipped follows w alone, up to rounding, so the scale only gathers rounding errors from it
    (arXiv 1902.08153). A zero point z shifts low and high, so it only moves what is clipped: by -scale for each unit.

    Args:
        gradient: of the loss by the values.
        position: w / scale.
        scale: one for each group, or one for the whole matrix.
        low: the least code, counted from the zero point.
        high: the greatest.
    """
    rounded = position.round()
    code = rounded.clamp(low, high)
    inside = code == rounded
    scaled = gradient * scale
    of_position = scaled * inside
    of_scale = code.mul_(scaled).sub_(of_position * position)
    of_zero = of_position - scaled
    return GridGradients(of_position, of_scale.sum_to_size(scale.shape), of_zero.sum_to_size(scale.shape))


def rounded_tokens(x: Float[Tensor, "*tokens n"], bits: int, clip: float) -> Float[Tensor, "*tokens n"]:
    """Each token's entries rounded to signed integers of so many bits times one scale; gradients pass straight through.

    Args:
        x: any float dtype.
        bits: 2 to 8; the codes are symmetric.
        clip: fraction of the largest entry that the largest code stands for; beyond it, entries have no gradient.
    """
    largest = 2 ** (bits - 1) - 1
    limit = x.detach().abs().amax(-1, keepdim=True).mul_(clip)
    scale = (limit / largest).clamp(min=torch.finfo(x.dtype).tiny)
    inside = torch.minimum(torch.maximum(x, -limit), limit)
    lost: Tensor = (inside / scale).round() * scale - inside
    return inside + lost.detach()


def rounded_to_extremes(
    x: Float[Tensor, "rows groups size"], bits: int, *, symmetric: bool
) -> Float[Tensor, "rows groups size"]:
    """Rounded to a grid that spans each group's extremes; gradients pass straight through, and through the span.

    Zero stays on the grid. Scales are not rounded to 16 bits: what is learned from them is nearly the same.
    """
    top = 2**bits - 1
    if symmetric:
        scale = x.abs().amax(-1, keepdim=True) * (2 / top)
        zero = torch.full_like(scale, 2.0 ** (bits - 1))
    else:
        low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
        scale = (high - low) / top
        zero = (-low / scale.clamp(min=torch.finfo(x.dtype).tiny)).round().clamp(0, top).detach()
    scale = torch.where(scale == 0, 1.0, scale)
    position = x / scale
    nearest = position + (position.round() - position).detach()
    return nearest.clamp(-zero, top - zero) * scale

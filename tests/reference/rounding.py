"""Straight-through rounding by autograd, in float64: what the gradients of learned rounding must be."""

import torch
from torch import Tensor


def straight_through(x: Tensor) -> Tensor:
    """Rounded, with the gradient of its argument."""
    return x + (x.round() - x).detach()


def gradients(
    gradient: Tensor, w: Tensor, offset: Tensor, scale: Tensor, low: Tensor, high: Tensor
) -> tuple[Tensor, Tensor]:
    """d Σ gradient · scale · clip(round(w / scale + offset)) by offset and scale; groups are the last dimension."""
    offset, scale = (each.double().requires_grad_() for each in (offset, scale))
    code = straight_through(w.double() / scale + offset).clamp(low.double(), high.double())
    by_offset, by_scale = torch.autograd.grad((gradient.double() * scale * code).sum(), (offset, scale))
    return by_offset, by_scale


def on_grid(w: Tensor, log_scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """exp(log_scale) · (clip(round(w / scale) + round(zero), 0, 2^bits - 1) - round(zero)): Block-AP."""
    scale, middle = log_scale.exp(), straight_through(zero)
    code = (straight_through(w / scale) + middle).clamp(0, 2**bits - 1)
    return scale * (code - middle)


def on_span(w: Tensor, high: Tensor, low: Tensor | None, bits: int) -> Tensor:
    """Rounded to the grid from -low to high, as OmniQuant's paper has it; None: from -high to high."""
    top = 2**bits - 1
    scale = 2 * high / top if low is None else (high + low) / top
    middle = torch.full_like(high, 2.0 ** (bits - 1)) if low is None else straight_through(low / scale)
    return scale * ((straight_through(w / scale) + middle).clamp(0, top) - middle)

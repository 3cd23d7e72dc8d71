"""Straight-through rounding by autograd, in float64: what the gradients of learned rounding must be."""

import torch
from torch import Tensor


def straight_through(x: Tensor) -> Tensor:
    """Rounded, with the gradient of its argument."""
    return x + (x.round() - x).detach()


def gradients(gradient: Tensor, position: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """d Σ gradient · scale · clip(round(position)) by position and scale; groups are the last dimension."""
    scale, position = (each.double().requires_grad_() for each in (scale, position))
    code = straight_through(position).clamp(low.double(), high.double())
    by_position, by_scale = torch.autograd.grad((gradient.double() * scale * code).sum(), (position, scale))
    return by_position, by_scale

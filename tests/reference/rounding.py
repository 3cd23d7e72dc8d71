"""Straight-through rounding by autograd, in float64: what the gradients of learned rounding must be."""

import torch
from torch import Tensor


def straight_through(x: Tensor) -> Tensor:
    """Rounded, with the gradient of its argument."""
    return x + (x.round() - x).detach()


def gradients(
    gradient: Tensor, w: Tensor, scale: Tensor, shift: Tensor, low: Tensor, high: Tensor
) -> tuple[Tensor, Tensor]:
    """d Σ gradient · scale · clip(round(w / scale + shift)) by shift and scale; groups are the last dimension."""
    scale, shift = (each.double().requires_grad_() for each in (scale, shift))
    code = straight_through(w.double() / scale + shift).clamp(low.double(), high.double())
    by_shift, by_scale = torch.autograd.grad((gradient.double() * scale * code).sum(), (shift, scale))
    return by_shift, by_scale

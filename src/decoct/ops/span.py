"""Grids given by where they end: scale and zero point of a span, and gradients through both.

A grid of codes 0 … 2^bits - 1 that reaches from -low to high has scale = (high + low) / (2^bits - 1) and the zero point
low / scale, rounded. A symmetric one reaches from -high to high, with the zero point 2^(bits-1).
"""

import torch
from jaxtyping import Float
from torch import Tensor


def span_grid(
    high: Float[Tensor, "rows groups 1"], low: Float[Tensor, "rows groups 1"] | None, bits: int
) -> tuple[Float[Tensor, "rows groups 1"], Float[Tensor, "rows groups 1"]]:
    """Scale and zero point, the latter rounded to a code.

    Args:
        high: the largest value, at least 0; above 0 where `low` is 0.
        low: the smallest one's size, at least 0; None for a symmetric grid.
        bits: 2 to 8.
    """
    top = 2**bits - 1
    if low is None:
        return 2.0 * high / top, torch.full_like(high, 2.0 ** (bits - 1))
    scale = (high + low) / top
    return scale, (low / scale).round().clamp_(0, top)


def span_gradients(
    of_scale: Float[Tensor, "rows groups 1"],
    of_zero: Float[Tensor, "rows groups 1"],
    high: Float[Tensor, "rows groups 1"],
    low: Float[Tensor, "rows groups 1"] | None,
    bits: int,
) -> tuple[Float[Tensor, "rows groups 1"], Float[Tensor, "rows groups 1"]]:
    """Gradients by high and low, given those by scale and zero point; rounding passes straight through.

    Those by low are zero for a symmetric grid.
    """
    top = 2**bits - 1
    if low is None:
        return of_scale * (2.0 / top), torch.zeros_like(high)
    whole = high + low
    return (
        of_scale / top - of_zero * (top * low / whole.square()),
        of_scale / top + of_zero * (top * high / whole.square()),
    )

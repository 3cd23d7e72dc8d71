"""Evenly spaced levels with a step for each group: rounding to them, with gradients, and fitting the step."""

from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from decoct.ops.parallel import each_piece

_FACTORS = 48  # steps that are tried for each group
_LEAST = 0.1  # of the largest: the smallest of them


def level_codes(
    w: Float[Tensor, "rows cols"], step: Float[Tensor, "rows groups"], zero: float, levels: int
) -> UInt8[Tensor, "rows cols"]:
    """The nearest level of each weight, counted from 0; level `zero` stands for the value 0."""
    grouped = w.float().reshape(*step.shape, -1)
    return _codes(grouped, step.float().unsqueeze(-1), zero, levels).to(torch.uint8).reshape(w.shape)


def round_to_levels(
    w: Float[Tensor, "rows cols"],
    step: Float[Tensor, "rows groups"],
    zero: float,
    levels: int,
    *,
    wide: bool,
) -> Float[Tensor, "rows cols"]:
    """(nearest level - zero)·step, float32; differentiable in weights and steps (LSQ, arXiv 1902.08153).

    Rounding passes gradients on. A weight beyond the outer levels is clipped: it has no gradient, and its step the
    level's. Inside, a step has what rounding did to the weight, in steps.

    Args:
        w: the weights, float32.
        step: between two levels, of each group of columns, float32.
        zero: see `level_codes`.
        levels: how many there are.
        wide: clip half a step beyond the outer levels (SEQ, arXiv 2502.02631), not at them.
    """
    return _Rounding.apply(w, step, zero, levels, 0.5 if wide else 0.0)  # type: ignore[no-any-return, no-untyped-call]


def fit_step(
    w: Float[Tensor, "rows cols"], size: int, zero: float, levels: int, dtype: torch.dtype
) -> Float[Tensor, "rows groups"]:
    """Of each group of `size` columns the step with the least squared error among many, as `dtype` stores it.

    Raises:
        ValueError: weights that are not finite.
    """
    if not torch.isfinite(w.sum(dtype=torch.float32)):
        raise ValueError("the weights hold NaN or infinite values; the checkpoint is damaged")
    found = torch.empty(w.shape[0], w.shape[1] // size, dtype=dtype)

    def work(part: slice) -> None:
        grouped = w[part].float().reshape(-1, w.shape[1] // size, size)
        largest = grouped.abs().amax(-1) / (min(zero, levels - 1 - zero) or 1.0)
        largest = torch.where(largest > 0, largest, torch.ones_like(largest))
        best, least = largest.to(dtype), torch.full_like(largest, torch.inf)
        for factor in torch.linspace(1.0, _LEAST, _FACTORS).tolist():
            step = (largest * factor).to(dtype)
            error = (_values(grouped, step.float().unsqueeze(-1), zero, levels) - grouped).square_().sum(-1)
            best = torch.where(error < least, step, best)
            least = torch.minimum(error, least)
        found[part] = best

    each_piece(work, w.shape[0], w.shape[1], w.device)
    return found


def _codes(grouped: Tensor, step: Tensor, zero: float, levels: int) -> Tensor:
    return grouped.div(step).add_(zero).round_().clamp_(0, levels - 1)


def _values(grouped: Tensor, step: Tensor, zero: float, levels: int) -> Tensor:
    return _codes(grouped, step, zero, levels).sub_(zero).mul_(step)


class _Rounding(torch.autograd.Function):
    """See `round_to_levels`."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, step: Tensor, zero: float, levels: int, margin: float) -> Tensor:
        """Round."""
        ctx.save_for_backward(w, step)
        ctx.settings = (zero, levels, margin)
        return _values(w.reshape(*step.shape, -1), step.unsqueeze(-1), zero, levels).reshape(w.shape)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        """Pass on."""
        w, step = ctx.saved_tensors
        zero, levels, margin = ctx.settings
        place = w.reshape(*step.shape, -1).div(step.unsqueeze(-1)).add_(zero)
        code = place.round().clamp_(0, levels - 1)
        inside = (place >= -margin) & (place <= levels - 1 + margin)
        g = outer[0].reshape(place.shape)
        of_step = (torch.where(inside, code - place, code - zero) * g).sum(-1)
        return (g * inside).reshape(w.shape), of_step, None, None, None

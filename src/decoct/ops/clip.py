"""Choosing a clip for each group of weights by what it costs the layer's output, other groups' errors included."""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from decoct.ops.grid import Grid, dequantize, fit_grid, quantize, stored_scale
from decoct.ops.parallel import each_piece

_LEAST, _STEPS = 0.5, 21  # shrink factors tried: 1.00, 0.975, ... 0.50


def fit_clip(
    w: Float[Tensor, "rows cols"],
    H: Float[Tensor, "cols cols"],
    *,
    bits: int,
    group_size: int | str,
    symmetric: bool,
    scale_dtype: torch.dtype,
) -> Grid:
    """The grid that rounding to nearest loses least on: group by group, the span shrunk in steps, signs both ways.

    A group's choice counts with its cross terms: with D the change of all weights, shrinking group g changes a row's
    error D·H·Dᵀ by D_g·H_gg·D_gᵀ + 2·D_g·(H·D)_{others}. So the error never grows, from the full spans on.

    Args:
        w: the matrix, float32.
        H: of the squared output error, symmetric.
        bits: 2 to 8.
        group_size: columns that share a scale, or "channel".
        symmetric: no zero points.
        scale_dtype: the dtype that scales are stored in.

    Raises:
        ValueError: as for `fit_grid`.
    """
    spans = fit_grid(w, bits=bits, group_size=group_size, symmetric=symmetric, scale_dtype=scale_dtype)
    rows, cols = w.shape
    scale = spans.scale.clone()
    zero = None if spans.zero is None else spans.zero.clone()
    whole = dequantize(quantize(w, spans), spans).sub_(w)

    def fit(part: slice) -> None:
        values, change = w[part], whole[part]
        pull = change @ H
        for group in range(cols // spans.group_size):
            at = slice(group * spans.group_size, (group + 1) * spans.group_size)
            block = H[at, at]
            others = pull[:, at] - change[:, at] @ block
            trial = _Trial(values[:, at], scale[part, group], None if zero is None else zero[part, group], bits)
            best, loss = change[:, at].clone(), torch.full_like(pull[:, 0], torch.inf)
            factors = torch.linspace(1.0, _LEAST, _STEPS).tolist()
            for factor in [*factors, *(-each for each in factors)] if zero is None else factors:
                step, middle, moved = trial.at(factor, scale_dtype)
                cost = torch.addmm(others, moved, block, beta=2.0).mul_(moved).sum(1)
                better = cost < loss
                loss = torch.where(better, cost, loss)
                best = torch.where(better.unsqueeze(1), moved, best)
                scale[part, group] = torch.where(better, step, scale[part, group].float()).to(scale_dtype)
                if zero is not None:
                    zero[part, group] = torch.where(better, middle, zero[part, group].float()).to(torch.uint8)
            pull.addmm_(best - change[:, at], H[at])
            change[:, at] = best

    each_piece(fit, rows, cols)
    return replace(spans, scale=scale, zero=zero)


class _Trial:
    """One group of some rows, rounded to spans of different width."""

    def __init__(self, values: Tensor, span: Tensor, zero: Tensor | None, bits: int) -> None:
        self._values, self._bits = values, bits
        self._span = span.float().clone()  # the caller writes over what it handed in
        self._symmetric = zero is None
        self._zero = torch.full_like(self._span, 2.0 ** (bits - 1)) if zero is None else zero.float().clone()

    def at(self, factor: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Scale and zero point of each row with the span times `factor`, and the change that rounding makes."""
        top = 2**self._bits - 1
        step = stored_scale(self._span * factor, dtype)
        # Both ends shrink alike, so the zero point moves only by what rounding the scale did.
        middle = self._zero if self._symmetric else (self._zero * factor * self._span / step).round().clamp_(0, top)
        wide, below = step.unsqueeze(1), middle.unsqueeze(1)
        rounded = torch.minimum(torch.maximum((self._values / wide).round_(), -below), top - below)
        return step, middle, rounded.mul_(wide).sub_(self._values)

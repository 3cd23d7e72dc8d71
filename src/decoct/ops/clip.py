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
    apart: bool = False,
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
        apart: then move each end of the span alone (BitDistiller, arXiv 2402.10631); for grids with zero points.

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
            found = _Search(trial, others, block, scale_dtype)
            found.shrink(apart=apart)
            best = found.moved
            scale[part, group] = found.step.to(scale_dtype)
            if zero is not None:
                zero[part, group] = found.middle.to(torch.uint8)
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

    @property
    def symmetric(self) -> bool:
        """Whether there are no zero points."""
        return self._symmetric

    def at(self, low: Tensor, high: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Scale and zero point of each row with the ends of the span times `low` and `high`, and what rounding changes.

        Without zero points both are the same; where they are negative, so is the scale.
        """
        top = 2**self._bits - 1
        if self._symmetric:
            step = stored_scale(self._span * low, dtype)
            middle = self._zero
        else:
            step = stored_scale(self._span * (self._zero * low + (top - self._zero) * high) / top, dtype)
            middle = (self._zero * low * self._span / step).round().clamp_(0, top)
        wide, below = step.unsqueeze(1), middle.unsqueeze(1)
        rounded = torch.minimum(torch.maximum((self._values / wide).round_(), -below), top - below)
        return step, middle, rounded.mul_(wide).sub_(self._values)


class _Search:
    """The best of the spans that were tried, for each row of a group.

    Attributes:
        step: scale.
        middle: zero point.
        moved: what rounding changes.
    """

    def __init__(self, trial: _Trial, others: Tensor, block: Tensor, dtype: torch.dtype) -> None:
        self._trial, self._others, self._block, self._dtype = trial, others, block, dtype
        self._low = self._high = torch.ones_like(others[:, 0])
        self._loss = torch.full_like(self._low, torch.inf)
        self.step, self.middle, self.moved = trial.at(self._low, self._high, dtype)

    def shrink(self, *, apart: bool) -> None:
        """Try both ends alike, with both signs where there are no zero points; then, if asked for, each end alone."""
        factors = torch.linspace(1.0, _LEAST, _STEPS).tolist()
        for factor in [*factors, *(-each for each in factors)] if self._trial.symmetric else factors:
            both = torch.full_like(self._low, factor)
            self._take(both, both)
        if not apart:
            return
        high = self._high
        for factor in factors:
            self._take(torch.full_like(high, factor), high)
        low = self._low
        for factor in factors:
            self._take(low, torch.full_like(low, factor))

    def _take(self, low: Tensor, high: Tensor) -> None:
        step, middle, moved = self._trial.at(low, high, self._dtype)
        cost = torch.addmm(self._others, moved, self._block, beta=2.0).mul_(moved).sum(1)
        better = cost < self._loss
        self._loss = torch.where(better, cost, self._loss)
        self.moved = torch.where(better.unsqueeze(1), moved, self.moved)
        self.step, self.middle = torch.where(better, step, self.step), torch.where(better, middle, self.middle)
        self._low, self._high = torch.where(better, low, self._low), torch.where(better, high, self._high)

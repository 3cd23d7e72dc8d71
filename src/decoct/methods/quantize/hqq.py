"""HQQ, half-quadratic quantization (Badri and Shaji, 2023; used in arXiv 2312.17238): real zero points without data."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from decoct.methods.base import LinearMethod, quantize_structure
from decoct.ops.grid import Grid, check_grid, quantize_packed, resolve_group_size, stored_scale, stored_scale_dtype
from decoct.ops.parallel import each_piece
from decoct.weights import GroupInt, Weight

_GROWTH = 1.01  # of beta in each step, as in the authors' code
_STARTS = (1.0, 0.85, 0.7)  # shares of a group's span that the search starts from
_ZEROS = ("snapped", "real", "integer")
_ZERO_DTYPE = torch.float16  # zero points are counted in codes: float16's 11 digits matter more than bfloat16's range
_FARTHEST_ZERO = 1024.0  # codes; from there on float16 places a zero point no better than half a code
_LEAST_ERROR = 1e-6  # codes; keeps its negative powers finite
_LEAST_COLUMN = 1e-4  # of the mean square of all: quieter columns count no more than such a one
_ROWS = 1024  # of a matrix that are read as float32 at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class HQQ(LinearMethod):
    """Fit each group's zero point, a real number, to the codes that it leads to. Needs no data.

    Minimises Σ |w - ŵ|^lp_norm by half-quadratic splitting: errors that stand out are set aside (shrunk by how far they
    stand out), the zero point is solved for the rest in closed form, weights are rounded again.

    With a real zero point, 0 is not on the grid, and all the near-zero weights of a group err the same way. That hurts
    where a loud input meets weights that training made small, as in attn.v. So zero points are snapped: a group's
    becomes the nearest integer where that lowers its squared error relative to each column's own mean square.

    Attributes:
        bits: 2 to 8.
        group_size: input features that share a scale and a zero point, or "channel" (one a row), or "tensor".
        zero: "snapped"; "real", as in the paper; or "integer" everywhere, which takes fewer bits and which other
            formats can hold.
        lp_norm: the power of an error that counts. Below 2 a few large errors matter less; 2 is least squares, where
            nothing is set aside.
        beta: how soon an error stands out: beyond beta**(1 / (lp_norm - 2)) codes.
        num_steps: steps at most; a group stops when a step no longer helps it, and keeps its best.
        learn_scale: solve for the scale too; the paper keeps it.
        clip_search: start from narrower spans as well as from the extremes, and keep the best for each group.
    """

    bits: int = 4
    group_size: int | str = 64
    zero: str = "snapped"
    lp_norm: float = 2.0
    beta: float = 10.0
    num_steps: int = 20
    learn_scale: bool = True
    clip_search: bool = True

    def __post_init__(self) -> None:
        check_grid(self.bits, self.group_size)
        if self.zero not in _ZEROS:
            raise ValueError(f"zero must be one of {', '.join(_ZEROS)}, not {self.zero!r}")
        if not 0 < self.lp_norm <= 2:
            raise ValueError(f"lp_norm must be above 0 and at most 2, not {self.lp_norm}")
        if self.beta <= 0 or self.num_steps < 0:
            raise ValueError("beta must be positive, num_steps 0 or more")

    def check(self, shape: tuple[int, int]) -> None:
        """The group size must divide the input features."""
        resolve_group_size(self.group_size, shape[1])

    def workspace(self, shape: tuple[int, int]) -> int:
        """The packed codes; the arithmetic runs over a few rows at a time, unless all share one scale."""
        entries = shape[0] * shape[1]
        return entries * (48 if self.group_size == "tensor" else 1) + (1 << 26)

    def operations(self, shape: tuple[int, int]) -> float:
        """Some twenty passes over the matrix for each of a few steps from each start."""
        starts = len(_STARTS) if self.clip_search else 1
        return 150.0 * (1 + starts * min(self.num_steps, 10)) * shape[0] * shape[1]

    def compress(self, weight: Weight, stat: None = None) -> Weight:
        """Quantize; masks and low rank are kept, and pruned entries do not count."""
        return quantize_structure(weight, stat, self._dense, "hqq")

    def _dense(self, w: Float[Tensor, "out in"], mask: Bool[Tensor, "out in"] | None, _: Any) -> Weight:
        grid = half_quadratic_grid(w, self, mask)
        return GroupInt.of_packed(quantize_packed(w, grid), (w.shape[0], w.shape[1]), grid, w.dtype)


def half_quadratic_grid(w: Float[Tensor, "out in"], settings: HQQ, mask: Bool[Tensor, "out in"] | None = None) -> Grid:
    """Scales and zero points for a matrix.

    Args:
        w: any float dtype.
        settings: the method's.
        mask: True for entries that count; the others are free.

    Raises:
        ValueError: a group size that does not divide, or weights that are not finite or too large for their scales.
    """
    rows, cols = w.shape
    group_size = resolve_group_size(settings.group_size, cols)
    whole = settings.group_size == "tensor"
    lines, width, size = (1, rows * cols, rows * cols) if whole else (rows, cols, group_size)
    dtype = stored_scale_dtype(w.dtype)
    scale = torch.empty(lines, width // size, dtype=dtype, device=w.device)
    zero = torch.empty_like(scale, dtype=torch.uint8 if settings.zero == "integer" else _ZERO_DTYPE)
    values, survivors = w.reshape(lines, width), None if mask is None else mask.reshape(lines, width)
    columns = _column_weights(w, mask) if settings.zero == "snapped" else None

    def work(part: slice) -> None:
        kept = None if survivors is None else survivors[part].reshape(-1, size)
        fit = _Fit(values[part].float().reshape(-1, size), kept, settings, dtype)
        fit.run()
        if columns is not None:
            fit.snap(columns)
        scale[part] = fit.scale.reshape(-1, width // size).to(scale.dtype)
        zero[part] = fit.zero.reshape(-1, width // size).to(zero.dtype)

    each_piece(work, lines, width, w.device)
    return Grid(scale, zero, settings.bits, group_size)


class _Fit:
    """Some groups [groups, size], and the best scale and zero point [groups, 1] found for each; all float32.

    Errors are counted in codes, so that neither beta nor the sums depend on the size of the weights.
    """

    def __init__(self, groups: Tensor, kept: Tensor | None, settings: HQQ, dtype: torch.dtype) -> None:
        self._groups, self._settings, self._dtype = groups, settings, dtype
        self._kept = None if kept is None else kept.float()
        self._top = 2**settings.bits - 1
        self._low, self._high = _extremes(groups, kept)
        self.scale, self.zero = self._start(1.0)
        if not torch.isfinite(torch.maximum(self.zero, self._top - self.zero) * self.scale).all():
            raise ValueError(f"the weights are too large for scales in {dtype}; the checkpoint is damaged")
        self._unit = self.scale.clone()
        self._error = torch.full_like(self.scale, torch.inf)

    def run(self) -> None:
        """Descend from every start."""
        for share in _STARTS if self._settings.clip_search else _STARTS[:1]:
            self._descend(*self._start(share))

    def snap(self, columns: Tensor) -> None:
        """Move zero points to the nearest integer where that lowers the squared error, weighted by column."""
        weights = columns.expand(self._groups.numel() // columns.numel(), -1).reshape(self._groups.shape)
        weights = weights if self._kept is None else weights * self._kept
        errors = []
        for zero in (self.zero, self.zero.round()):
            position = self._groups.div(self.scale).add_(zero)
            lost = position.round().clamp_(0, self._top).sub_(position)
            errors.append(_mean(lost.square_(), weights))
        self.zero = torch.where(errors[1] < errors[0], self.zero.round(), self.zero)

    def _start(self, share: float) -> tuple[Tensor, Tensor]:
        """The grid that spans a share of each group, around its middle."""
        outer, inner = 0.5 + 0.5 * share, 0.5 - 0.5 * share
        low, high = outer * self._low + inner * self._high, outer * self._high + inner * self._low
        farthest = torch.maximum(low.abs(), high.abs()) / _FARTHEST_ZERO
        scale = stored_scale(torch.maximum(high / self._top - low / self._top, farthest), self._dtype)
        return scale, self._stored_zero(-low / scale)

    def _descend(self, scale: Tensor, zero: Tensor) -> None:
        """Round and solve in turn; a group that a step does not help stops there."""
        numbers = torch.arange(self._groups.shape[0], device=scale.device)
        groups, kept, least = self._groups, self._kept, torch.full_like(scale, torch.inf)
        for step in range(self._settings.num_steps + 1):
            position = groups.div(scale).add_(zero)
            codes = position.round().clamp_(0, self._top)
            error, aside = self._judge(position - codes, kept, self._settings.beta * _GROWTH**step)
            error = error * (scale / self._unit[numbers]) ** self._settings.lp_norm
            self._keep_best(numbers, error, scale, zero)
            helped = (error < least).squeeze(1)
            if step == self._settings.num_steps or not helped.any():
                return
            if aside is not None:
                position.sub_(aside)
            if not helped.all():
                groups, position, codes = groups[helped], position[helped], codes[helped]
                scale, zero, numbers, error = scale[helped], zero[helped], numbers[helped], error[helped]
                kept = None if kept is None else kept[helped]
            least = error
            scale, zero = self._solve(position, codes, kept, scale, zero)

    def _judge(self, lost: Tensor, kept: Tensor | None, beta: float) -> tuple[Tensor, Tensor | None]:
        """Each group's mean error, and the part of every error that is set aside: that which stands out."""
        if self._settings.lp_norm == 2:
            return _mean(lost.square_(), kept), None
        size = lost.abs().clamp_(min=_LEAST_ERROR)
        slope = size.pow(self._settings.lp_norm - 1)
        error = _mean(size * slope, kept)
        return error, size.sub_(slope.div_(beta)).clamp_(min=0).copysign_(lost)

    def _keep_best(self, numbers: Tensor, error: Tensor, scale: Tensor, zero: Tensor) -> None:
        better = (error < self._error[numbers]).squeeze(1)
        where = numbers[better]
        self._error[where], self.scale[where], self.zero[where] = error[better], scale[better], zero[better]

    def _solve(
        self, position: Tensor, codes: Tensor, kept: Tensor | None, scale: Tensor, zero: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The line through (code, weight) with the least squared error: its slope is the scale.

        Positions are weights / scale + zero, less what was set aside.
        """
        code, place = _mean(codes, kept), _mean(position, kept)
        solved = scale
        if self._settings.learn_scale:
            centred = codes - code
            slope = _mean(position.mul_(centred), kept) / _mean(centred.square_(), kept)
            usable = torch.isfinite(slope) & (slope > 0)
            solved = stored_scale(torch.where(usable, slope, 1.0) * scale, self._dtype)
        return solved, self._stored_zero(code - (place - zero) * (scale / solved))

    def _stored_zero(self, zero: Tensor) -> Tensor:
        """As it will be stored, float32."""
        if self._settings.zero == "integer":
            return zero.round().clamp_(0, self._top)
        return zero.to(_ZERO_DTYPE).float()


def _extremes(groups: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor]:
    """Least and largest entry of each group, [groups, 1]; zero where nothing is kept."""
    if kept is None:
        low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    else:
        some = kept.any(1, keepdim=True)
        low = groups.masked_fill(~kept, torch.inf).amin(1, keepdim=True).where(some, 0.0)
        high = groups.masked_fill(~kept, -torch.inf).amax(1, keepdim=True).where(some, 0.0)
    if not (torch.isfinite(low).all() and torch.isfinite(high).all()):
        raise ValueError("the weights hold NaN or infinite values; the checkpoint is damaged")
    return low, high


def _column_weights(w: Tensor, mask: Tensor | None) -> Tensor:
    """One over each input feature's mean square, [1, in], float32: what makes its errors relative."""
    total = torch.zeros(1, w.shape[1], device=w.device)
    count = torch.zeros_like(total)
    largest = w.abs().amax().float().clamp(min=torch.finfo(torch.float32).tiny)
    for start in range(0, w.shape[0], _ROWS):
        values = w[start : start + _ROWS].float() / largest
        total += values.square().sum(0, keepdim=True)
        count += values.shape[0] if mask is None else mask[start : start + _ROWS].sum(0, keepdim=True)
    energy = total / count.clamp(min=1)
    return 1.0 / (energy / energy.mean()).nan_to_num(nan=1.0).clamp(min=_LEAST_COLUMN)


def _mean(values: Tensor, weights: Tensor | None) -> Tensor:
    """Weighted mean of each group's entries, [groups, 1]; zero where all weights are."""
    if weights is None:
        return values.mean(1, keepdim=True)
    return (values * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True).clamp(min=_LEAST_COLUMN)

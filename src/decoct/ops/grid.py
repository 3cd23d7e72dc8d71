"""Uniform integer grids: choosing a scale (and zero point) for each group of weights, and rounding to them.

A group's value is `(code - zero) * scale` with an unsigned code in [0, 2**bits). Symmetric grids fix
zero = 2**(bits-1), so a code is a two's-complement integer with its sign bit flipped. Exact zero is on the grid, unless
zero points are real numbers.

A symmetric grid has one more code below zero than above. So a searched scale may be negative: the spare code then lies
on the side where the group reaches further, which takes 11 to 14 % off the squared error of Gaussian weights at 2 to 4
bits and costs nothing.
"""

from collections.abc import Collection
from dataclasses import dataclass
from math import gcd

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from decoct.ops.packing import pack_bits, packed_width
from decoct.ops.parallel import each_piece

_SEARCH_LOW, _SEARCH_STEPS = 0.5, 26  # shrink factors tried by the clip search: 1.00, 0.98, ... 0.50


@dataclass(frozen=True, slots=True)
class Grid:
    """Scales and zero points of one matrix.

    Attributes:
        scale: [rows, groups], in the dtype that will be stored (rounding it happens before any code is chosen).
        zero: [rows, groups], uint8, or 16-bit floats for real zero points; None for a symmetric grid.
        bits: 2 to 8.
        group_size: consecutive input features that share a scale.
    """

    scale: Float[Tensor, "rows groups"]
    zero: UInt8[Tensor, "rows groups"] | Float[Tensor, "rows groups"] | None
    bits: int
    group_size: int

    def columns(self, start: int, stop: int) -> tuple[Float[Tensor, "rows n"], Float[Tensor, "rows n"]]:
        """Float32 scale and zero of each column in [start, stop), expanded."""
        index = torch.arange(start, stop, device=self.scale.device) // self.group_size
        scale = self.scale[:, index].float()
        if self.zero is None:
            return scale, torch.full_like(scale, float(2 ** (self.bits - 1)))
        return scale, self.zero[:, index].float()


class GroupSizeError(ValueError):
    """A group size that does not divide a matrix's width; the message names sizes that do.

    Attributes:
        group_size: as it was given.
        in_features: the width.
    """

    def __init__(self, group_size: int, in_features: int, alike: Collection[int] = ()) -> None:
        """Put it into words.

        Args:
            group_size: as it was given.
            in_features: the width that it does not divide.
            alike: widths of other matrices that it is meant for too: sizes are named that divide them all.
        """
        self.group_size, self.in_features = group_size, in_features
        fits = [g for g in (4, 8, 16, 32, 48, 64, 96, 128, 256) if gcd(in_features, *alike) % g == 0]
        hint = f"use channel or {' or '.join(map(str, fits))}" if fits else "use channel"
        super().__init__(f"group_size {group_size} does not divide {in_features} input features; {hint}")


def resolve_group_size(group_size: int | str, in_features: int) -> int:
    """Turn "channel" and "tensor" into a number of columns and check that a number divides the width.

    Raises:
        GroupSizeError: the group size does not divide `in_features`.
        ValueError: it is no group size.
    """
    if group_size in ("channel", "tensor"):
        return in_features
    if not isinstance(group_size, int) or group_size < 1:
        raise ValueError(f"group_size must be a positive number, channel or tensor, not {group_size!r}")
    if in_features % group_size:
        raise GroupSizeError(group_size, in_features)
    return group_size


def fit_grid(
    w: Float[Tensor, "rows cols"],
    *,
    bits: int,
    group_size: int | str,
    symmetric: bool = True,
    scale_dtype: torch.dtype = torch.float16,
    importance: Float[Tensor, " cols"] | None = None,
    search: bool = False,
) -> Grid:
    """Choose each group's scale (and zero point).

    Without `search` the grid spans the group's extremes. With it, the span is shrunk in steps and the one with the
    least error Σ importance·(w - ŵ)² is kept: clipping a few large weights pays when bits are few. Symmetric grids are
    tried both ways round.

    Args:
        w: the matrix; any float dtype.
        bits: 2 to 8.
        group_size: columns that share a scale, or "channel" (a row each), or "tensor" (one for all).
        symmetric: no zero points.
        scale_dtype: the dtype that scales are stored in.
        importance: weight of each input column in the search, e.g. the Hessian's diagonal; uniform if None.
        search: look for the best clip instead of taking the extremes.

    Raises:
        ValueError: bits out of range, a group size that does not divide, or weights that are not finite.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"bits must be 2 to 8, not {bits}")
    rows, cols = w.shape
    size = resolve_group_size(group_size, cols)
    if group_size == "tensor":
        return _tensor_grid(w, bits, symmetric, scale_dtype)
    groups = cols // size
    weight = None if importance is None else importance.float().reshape(1, groups, size)
    scale = torch.empty(rows, groups, dtype=scale_dtype, device=w.device)
    zero = None if symmetric else torch.empty(rows, groups, dtype=torch.uint8, device=w.device)

    def fit(part: slice) -> None:
        values = w[part].float().reshape(-1, groups, size)
        found, middle = _span(values, bits, symmetric, scale_dtype)
        if search:
            found, middle = _search(values, weight, found, middle, bits, symmetric, scale_dtype)
        scale[part] = found.to(scale_dtype)
        if zero is not None:
            zero[part] = middle.to(torch.uint8)

    each_piece(fit, rows, cols, w.device)
    return Grid(scale, zero, bits, size)


def quantize(w: Float[Tensor, "rows cols"], grid: Grid) -> UInt8[Tensor, "rows cols"]:
    """Round every weight to its group's nearest code."""
    rows, cols = w.shape
    codes = torch.empty(rows, cols, dtype=torch.uint8, device=w.device)

    def work(part: slice) -> None:
        codes[part] = _codes(w, grid, part)

    each_piece(work, rows, cols, w.device)
    return codes


def quantize_packed(w: Float[Tensor, "rows cols"], grid: Grid) -> UInt8[Tensor, "rows bytes"]:
    """`pack_bits(quantize(w, grid), grid.bits)`, a few rows at a time: a large matrix needs no byte for each code."""
    rows, cols = w.shape
    packed = torch.empty(rows, packed_width(cols, grid.bits), dtype=torch.uint8, device=w.device)

    def work(part: slice) -> None:
        packed[part] = pack_bits(_codes(w, grid, part), grid.bits)

    each_piece(work, rows, cols, w.device)
    return packed


def dequantize(
    codes: UInt8[Tensor, "rows cols"], grid: Grid, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "rows cols"]:
    """Values of the codes, computed in float32 and rounded once to `dtype`."""
    rows, cols = codes.shape
    out = torch.empty(rows, cols, dtype=dtype, device=codes.device)

    def work(part: slice) -> None:
        scale, zero = _grouped(grid, part)
        groups = codes[part].reshape(-1, cols // grid.group_size, grid.group_size).float()
        out[part] = groups.sub_(zero).mul_(scale).reshape(-1, cols)

    each_piece(work, rows, cols, codes.device)
    return out


def _codes(w: Tensor, grid: Grid, part: slice) -> Tensor:
    """Codes of a row range."""
    scale, zero = _grouped(grid, part)
    cols = w.shape[1]
    groups = w[part].float().reshape(-1, cols // grid.group_size, grid.group_size)
    return _round(groups, scale, zero, grid.bits).to(torch.uint8).reshape(-1, cols)


def _grouped(grid: Grid, part: slice) -> tuple[Tensor, Tensor | float]:
    """A row range's scale and zero as [rows, groups, 1], ready to broadcast over [rows, groups, group_size]."""
    whole = grid.scale.shape[0] == 1  # a "tensor" grid: one scale for every row
    scale = (grid.scale if whole else grid.scale[part]).float().unsqueeze(-1)
    if grid.zero is None:
        return scale, float(2 ** (grid.bits - 1))
    return scale, (grid.zero if whole else grid.zero[part]).float().unsqueeze(-1)


def _round(groups: Tensor, scale: Tensor, zero: Tensor | float, bits: int) -> Tensor:
    return groups.div(scale).add_(zero).round_().clamp_(0, 2**bits - 1)


def _span(groups: Tensor, bits: int, symmetric: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale and zero [rows, groups] that cover each group's extremes."""
    top = 2**bits - 1
    high = (groups.abs() if symmetric else groups).amax(-1)  # two passes of amax are faster than one of aminmax
    low = -high if symmetric else groups.amin(-1)
    if not (torch.isfinite(high).all() and torch.isfinite(low).all()):
        raise ValueError("the weights hold NaN or infinite values; the checkpoint is damaged")
    if symmetric:
        scale = stored_scale(high * (2 / top), dtype)
        zero = torch.full_like(high, 2 ** (bits - 1))
    else:
        low, high = low.clamp(max=0), high.clamp(min=0)  # zero must stay on the grid
        scale = stored_scale(high / top - low / top, dtype)
        zero = (-low / scale).round().clamp_(0, top)
    if not torch.isfinite(torch.maximum(zero, top - zero) * scale).all():
        raise ValueError(f"the weights are too large for scales in {dtype}; the checkpoint is damaged")
    return scale, zero


def stored_scale(scale: Float[Tensor, "*shape"], dtype: torch.dtype) -> Float[Tensor, "*shape"]:
    """Scales as `dtype` will hold them, float32: never rounded to zero, and 1 for an all-zero group; signs stay."""
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    limits = torch.finfo(dtype)
    return scale.abs().clamp(min=limits.smallest_normal * limits.eps).copysign(scale).to(dtype).float()


def _search(
    groups: Tensor, weight: Tensor | None, scale: Tensor, zero: Tensor, bits: int, symmetric: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Shrink the span in steps; keep, for each group, the one with the least weighted squared error."""
    best = torch.full_like(scale, torch.inf)
    best_scale, best_zero = scale.clone(), zero.clone()
    span = scale.clone()
    factors = torch.linspace(1.0, _SEARCH_LOW, _SEARCH_STEPS).tolist()
    for factor in [*factors, *(-each for each in factors)] if symmetric else factors:
        trial = stored_scale(span * factor, dtype)
        # Both ends shrink by the same factor, so the zero point moves only by what rounding the scale did.
        shift = zero if symmetric else (zero * factor * span / trial).round().clamp_(0, 2**bits - 1)
        step, middle = trial.unsqueeze(-1), 2.0 ** (bits - 1) if symmetric else shift.unsqueeze(-1)
        error = groups.div(step).round_().clamp_(-middle, 2**bits - 1 - middle).mul_(step).sub_(groups).square_()
        loss = error.sum(-1) if weight is None else error.mul_(weight).sum(-1)
        better = loss < best
        best = torch.where(better, loss, best)
        best_scale = torch.where(better, trial, best_scale)
        best_zero = torch.where(better, shift, best_zero)
    return best_scale, best_zero


def _tensor_grid(w: Tensor, bits: int, symmetric: bool, dtype: torch.dtype) -> Grid:
    """One scale for the whole matrix."""
    low, high = torch.aminmax(w)
    extremes = torch.stack([low, high]).float().reshape(1, 1, 2)
    scale, zero = _span(extremes, bits, symmetric, dtype)
    return Grid(scale.to(dtype), None if symmetric else zero.to(torch.uint8), bits, w.shape[1])


def check_grid(bits: int, group_size: int | str) -> None:
    """Refuse numbers that no matrix can be quantized with.

    Raises:
        ValueError: bits not in 2..8, or a group size that is neither positive nor "channel" nor "tensor".
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"bits must be 2 to 8, not {bits}")
    if group_size not in ("channel", "tensor") and (not isinstance(group_size, int) or group_size < 1):
        raise ValueError(f"group_size must be a positive number, channel or tensor, not {group_size!r}")


def stored_scale_dtype(dtype: torch.dtype) -> torch.dtype:
    """Sixteen bits a scale: the weights' own dtype, or bfloat16 (which has float32's range) for wider ones."""
    return dtype if dtype in (torch.float16, torch.bfloat16) else torch.bfloat16

"""Matrices rounded to llama.cpp's tensor types by least squares, each entry weighted by how much it matters.

A block's scale is found by trying many, each refitted to the codes that it gives: the best scale for fixed codes has a
closed form. A matrix that lies on such a grid already (a calibrated method put it there) is found again exactly where
blocks have one level of scales; where scales are rounded too (super-blocks) codes and steps are refitted in turns.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from decoct.ops.ggml_blocks import BLOCKS, CODE_BITS, pack_block32, pack_nibbles32, pack_super, pack_trits
from decoct.ops.parallel import each_piece

FITTED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "TQ1_0", "TQ2_0")
"""Types that any matrix can be rounded to."""

_LEVELS = torch.tensor([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=torch.float32)
_TURNS = 3
_SMALLEST = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, slots=True)
class _Super:
    """A type of super-blocks: entries of a sub-block, largest code, and the range of sub-blocks' scales."""

    sub: int
    high: int
    scale_low: int
    scale_high: int

    @property
    def signed(self) -> bool:
        return self.scale_low < 0


_SUPERS = {
    "Q2_K": _Super(16, 3, 0, 15),
    "Q3_K": _Super(16, 7, -32, 31),
    "Q4_K": _Super(32, 15, 0, 63),
    "Q5_K": _Super(32, 31, 0, 63),
    "Q6_K": _Super(16, 63, -128, 127),
}


def round_to(
    kind: str, w: Float[Tensor, "rows cols"], importance: Float[Tensor, " cols"] | None = None
) -> Float[Tensor, "rows bytes"]:
    """A matrix in one of FITTED, as bytes, with the least (weighted) squared error that the search finds.

    Args:
        kind: the type.
        w: any float dtype.
        importance: of each column, such as the mean square of what it is multiplied with; None: all alike.

    Raises:
        ValueError: the type's blocks do not divide the columns, or the weights are not finite.
    """
    entries, nbytes = BLOCKS[kind]
    rows, cols = w.shape
    if cols % entries:
        raise ValueError(f"{kind} has blocks of {entries} entries, which do not divide {cols} input features")
    weight = torch.ones(cols) if importance is None else importance.float().clamp(min=0)
    weight = weight / weight.mean().clamp(min=_SMALLEST) + 1e-6  # a feature that was never seen still counts a little
    out = torch.empty(rows, cols // entries * nbytes, dtype=torch.uint8)

    def work(part: slice) -> None:
        out[part] = _round(kind, w[part].float(), weight)

    if not torch.isfinite(w.sum()):
        raise ValueError("the weights hold NaN or infinite values; the checkpoint is damaged")
    each_piece(work, rows, cols)
    return out


def _round(kind: str, w: Tensor, weight: Tensor) -> Tensor:
    if kind in _SUPERS:
        return _round_super(kind, w, weight)
    if kind in ("TQ1_0", "TQ2_0"):
        x, p = _split(w, weight, 256)
        scale = fit_signed(x, p, -1, 1).to(torch.float16)
        trits = _codes(x, scale.float(), -1, 1)
        return pack_trits(kind, trits.reshape(w.shape).to(torch.int8), scale)
    x, p = _split(w, weight, 32)
    if kind == "IQ4_NL":
        scale = _fit_levels(x, p).to(torch.float16)
        codes = _nearest_level(x, scale.float()).reshape(w.shape)
        return pack_nibbles32(codes, scale.unsqueeze(-1).view(torch.uint8))
    high = 2 ** CODE_BITS[kind] - 1
    if kind.endswith("_1"):
        scale, minimum = (each.to(torch.float16) for each in fit_affine(x, p, high))
        codes = _codes(x - minimum.float().unsqueeze(-1), scale.float(), 0, high)
        return pack_block32(kind, codes.reshape(w.shape).to(torch.uint8), scale, minimum)
    middle = (high + 1) // 2
    scale = fit_signed(x, p, -middle, high - middle).to(torch.float16)
    codes = _codes(x, scale.float(), -middle, high - middle) + middle
    return pack_block32(kind, codes.reshape(w.shape).to(torch.uint8), scale)


def fit_signed(
    x: Float[Tensor, "*n size"], weight: Float[Tensor, "*n size"], low: int, high: int
) -> Float[Tensor, "*n"]:
    """The scale of each group for codes from `low` to `high`: least Σ weight · (x - scale · code)², among many tried.

    A scale may be negative: `low` reaches one further than `high`, so the largest entry may have either sign.
    """
    place = x.abs().argmax(-1, keepdim=True)
    largest = x.gather(-1, place).squeeze(-1)
    best, gain = torch.zeros_like(largest), torch.zeros_like(largest)
    for levels in _trials(max(high, -low), both=-low > high):
        codes = _codes(x, largest / levels, low, high)
        weighted = codes * weight
        along, size = (weighted * x).sum(-1), (weighted * codes).sum(-1).clamp(min=_SMALLEST)
        found = along.square() / size
        better = found > gain
        gain, best = torch.where(better, found, gain), torch.where(better, along / size, best)
    return best


def fit_affine(
    x: Float[Tensor, "*n size"], weight: Float[Tensor, "*n size"], high: int, *, cover_zero: bool = False
) -> tuple[Float[Tensor, "*n"], Float[Tensor, "*n"]]:
    """Scale and minimum of each group for codes from 0 to `high`: least Σ weight · (x - scale · code - minimum)².

    Args:
        x: groups.
        weight: of each entry.
        high: the largest code.
        cover_zero: no minimum above zero.
    """
    top, bottom = x.amax(-1), x.amin(-1)
    if cover_zero:
        bottom = bottom.clamp(max=0)
    span = (top - bottom).clamp(min=0)
    total, mean = weight.sum(-1), (weight * x).sum(-1)
    best = torch.full_like(top, torch.inf)
    scale, minimum = torch.zeros_like(top), bottom.clone()
    for levels in _trials(high, both=False):
        codes = _codes(x - bottom.unsqueeze(-1), span / levels, 0, high)
        weighted = codes * weight
        first, second, cross = weighted.sum(-1), (weighted * codes).sum(-1), (weighted * x).sum(-1)
        determinant = total * second - first.square()
        slope = torch.where(determinant > 0, (total * cross - first * mean) / determinant.clamp(min=_SMALLEST), 0.0)
        offset = (mean - slope * first) / total
        if cover_zero:
            through_zero = cross / second.clamp(min=_SMALLEST)
            slope, offset = torch.where(offset > 0, through_zero, slope), offset.clamp(max=0)
        error = (codes * slope.unsqueeze(-1) + offset.unsqueeze(-1) - x).square_().mul_(weight).sum(-1)
        better = (error < best) & (slope >= 0)
        best = torch.where(better, error, best)
        scale, minimum = torch.where(better, slope, scale), torch.where(better, offset, minimum)
    return scale, minimum


def _trials(high: int, *, both: bool) -> list[float]:
    """How many levels the largest entry might be: about `high`, and fewer in case the group does not use them all."""
    near = [high + 0.15 * step for step in range(-7, 8)]
    fewer = [float(levels) for levels in range(max(1, high // 2), high + 1)] if high < 64 else [float(high)]
    found = sorted({round(level, 3) for level in (*near, *fewer) if level > 0.4})
    return [sign * level for level in found for sign in ((-1, 1) if both else (1,))]


def _split(w: Tensor, weight: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Rows as groups [rows, groups, size], and their entries' weights."""
    x = w.reshape(w.shape[0], -1, size)
    return x, weight.reshape(1, -1, size).expand_as(x)


def _codes(x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    inverse = torch.where(scale != 0, 1 / scale, 0.0).unsqueeze(-1)
    return (x * inverse).round_().clamp_(low, high)


def _fit_levels(x: Tensor, weight: Tensor) -> Tensor:
    """IQ4_NL: the scale for which the sixteen uneven levels are nearest."""
    largest = x.gather(-1, x.abs().argmax(-1, keepdim=True)).squeeze(-1)
    best, gain = torch.zeros_like(largest), torch.zeros_like(largest)
    for reach in (-127.0, -120.0, -113.0, -104.0, 104.0, 113.0, 120.0, 127.0):
        values = _LEVELS[_nearest_level(x, largest / reach).int()]
        weighted = values * weight
        along, size = (weighted * x).sum(-1), (weighted * values).sum(-1).clamp(min=_SMALLEST)
        found = along.square() / size
        better = found > gain
        gain, best = torch.where(better, found, gain), torch.where(better, along / size, best)
    return best


def _nearest_level(x: Tensor, scale: Tensor) -> Tensor:
    inverse = torch.where(scale != 0, 1 / scale, 0.0).unsqueeze(-1)
    middles = (_LEVELS[1:] + _LEVELS[:-1]) / 2
    return torch.bucketize(x * inverse, middles).to(torch.uint8)


def _round_super(kind: str, w: Tensor, weight: Tensor) -> Tensor:
    """Sub-blocks' scales first, as if they were free; then whole numbers for them; then codes and steps in turns."""
    shape = _SUPERS[kind]
    x, p = (each.reshape(w.shape[0], -1, 256 // shape.sub, shape.sub) for each in _split(w, weight, 256))
    fitted = _signed_super(x, p, shape) if shape.signed else _affine_super(x, p, shape)
    codes, scales, minima, step, minimum_step = fitted
    return pack_super(kind, codes.to(torch.uint8).reshape(w.shape), scales, minima, step, minimum_step)


_Fitted = tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None]


def _signed_super(x: Tensor, p: Tensor, shape: _Super) -> _Fitted:
    middle = (shape.high + 1) // 2
    local = fit_signed(x, p, -middle, shape.high - middle)
    largest = local.gather(-1, local.abs().argmax(-1, keepdim=True)).squeeze(-1)
    step = (largest / shape.scale_low).to(torch.float16).float()
    scales = _codes(local, step, shape.scale_low, shape.scale_high)
    best = torch.full_like(step, torch.inf)
    kept: tuple[Tensor, ...] = (torch.zeros_like(x), scales, step)
    for _ in range(_TURNS):
        codes = _codes(x, step.unsqueeze(-1) * scales, -middle, shape.high - middle)
        whole = codes * scales.unsqueeze(-1)
        error = (whole * step[..., None, None] - x).square_().mul_(p).sum((-1, -2))
        better = error < best
        best = torch.where(better, error, best)
        kept = _choose(better, (codes, scales, step), kept)
        refitted = (codes * x * p).sum(-1) / (codes.square() * p).sum(-1).clamp(min=_SMALLEST)
        scales = _codes(refitted, step, shape.scale_low, shape.scale_high)
        whole = codes * scales.unsqueeze(-1)
        step = (whole * x * p).sum((-1, -2)) / (whole.square() * p).sum((-1, -2)).clamp(min=_SMALLEST)
        step = step.to(torch.float16).float()
    return kept[0] + middle, kept[1].int(), None, kept[2], None


def _choose(better: Tensor, new: tuple[Tensor, ...], old: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Of each super-block [rows, blocks], the new values where they are better."""
    at = [better.reshape(*better.shape, *[1] * (each.ndim - 2)) for each in new]
    return tuple(torch.where(*each) for each in zip(at, new, old, strict=True))


def _affine_super(x: Tensor, p: Tensor, shape: _Super) -> _Fitted:
    scale, minimum = fit_affine(x, p, shape.high, cover_zero=True)
    step = (scale.amax(-1) / shape.scale_high).to(torch.float16).float()
    lower = (-minimum.amin(-1) / shape.scale_high).to(torch.float16).float()
    scales, minima = _codes(scale, step, 0, shape.scale_high), _codes(-minimum, lower, 0, shape.scale_high)
    best = torch.full_like(step, torch.inf)
    kept: tuple[Tensor, ...] = (torch.zeros_like(x), scales, minima, step, lower)
    for _ in range(_TURNS):
        offset = (lower.unsqueeze(-1) * minima).unsqueeze(-1)
        codes = _codes(x + offset, step.unsqueeze(-1) * scales, 0, shape.high)
        whole = codes * scales.unsqueeze(-1)
        error = (whole * step[..., None, None] - offset - x).square_().mul_(p).sum((-1, -2))
        better = error < best
        best = torch.where(better, error, best)
        kept = _choose(better, (codes, scales, minima, step, lower), kept)
        step, lower = _refit_steps(x, p, whole, minima.unsqueeze(-1).expand_as(x), step, lower)
    return kept[0], kept[1].int(), kept[2].int(), kept[3], kept[4]


def _refit_steps(
    x: Tensor, p: Tensor, whole: Tensor, minima: Tensor, step: Tensor, lower: Tensor
) -> tuple[Tensor, Tensor]:
    """Both steps of a super-block given all whole numbers: two normal equations."""

    def total(values: Tensor) -> Tensor:
        return (values * p).sum((-1, -2))

    aa, bb, ab = total(whole.square()), total(minima.square()), total(whole * minima)
    ax, bx = total(whole * x), total(minima * x)
    determinant = aa * bb - ab.square()
    alone = ax / aa.clamp(min=_SMALLEST)
    solvable = determinant > 1e-6 * aa * bb
    new = torch.where(solvable, (bb * ax - ab * bx) / determinant.clamp(min=_SMALLEST), alone)
    new_lower = torch.where(solvable, (ab * ax - aa * bx) / determinant.clamp(min=_SMALLEST), lower)
    fits = (new > 0) & (new_lower >= 0)
    kept = torch.where(fits, new, step), torch.where(fits, new_lower, lower)
    return kept[0].to(torch.float16).float(), kept[1].to(torch.float16).float()

"""HQQ group by group in plain float64, from the formulas of its authors' text.

W_q = clamp(round(W/s + z)); W_r = (W_q - z)·s; W_e = sign·relu(|W - W_r| - |W - W_r|^(p-1)/β), errors in units of s;
z = mean(W_q - (W - W_e)/s), or, with the scale, the least-squares line through the points (W_q, W - W_e).
"""

import math
from dataclasses import dataclass

import torch

from tests.reference.grids import stored

Pair = tuple[float, float]


@dataclass(frozen=True)
class Settings:
    """As the method's fields; starts are shares of the span."""

    bits: int
    p: float
    beta: float = 10.0
    steps: int = 20
    learn_scale: bool = True
    integer: bool = False
    starts: tuple[float, ...] = (1.0,)


def shrink(error: float, p: float, beta: float) -> float:
    """The part of an error that is set aside."""
    if p == 2 or error == 0:
        return 0.0
    return math.copysign(max(0.0, abs(error) - abs(error) ** (p - 1) / beta), error)


def codes(group: list[float], pair: Pair, bits: int) -> list[int]:
    """Nearest codes."""
    scale, zero = pair
    return [min(max(round(w / scale + zero), 0), 2**bits - 1) for w in group]


def values(group: list[float], pair: Pair, bits: int) -> list[float]:
    """What they stand for."""
    return [(code - pair[1]) * pair[0] for code in codes(group, pair, bits)]


def loss(group: list[float], pair: Pair, bits: int, p: float) -> float:
    """Σ |w - ŵ|^p."""
    return sum(abs(w - v) ** p for w, v in zip(group, values(group, pair, bits), strict=True))


def stored_zero(zero: float, settings: Settings) -> float:
    """In float16, or an integer that is a code."""
    if settings.integer:
        return float(min(max(round(zero), 0), 2**settings.bits - 1))
    return float(torch.tensor(zero, dtype=torch.float64).half())


def step(group: list[float], pair: Pair, beta: float, settings: Settings) -> Pair:
    """One round of the half-quadratic solver."""
    scale, zero = pair
    q = codes(group, pair, settings.bits)
    kept = [w - scale * shrink(w / scale - (c - zero), settings.p, beta) for w, c in zip(group, q, strict=True)]
    n = len(group)
    mean_q = sum(q) / n
    if settings.learn_scale:
        spread = sum((c - mean_q) ** 2 for c in q)
        slope = sum((c - mean_q) * w for c, w in zip(q, kept, strict=True)) / spread if spread else 0.0
        scale = stored(slope, torch.bfloat16) if slope > 0 else scale
    return scale, stored_zero(sum(c - w / scale for c, w in zip(q, kept, strict=True)) / n, settings)


def start(group: list[float], share: float, settings: Settings) -> Pair:
    """The grid over a share of the span, around its middle."""
    low, high = min(group), max(group)
    middle, reach = (low + high) / 2, share * (high - low) / 2
    scale = max(2 * reach / (2**settings.bits - 1), max(abs(middle - reach), abs(middle + reach)) / 1024)
    scale = stored(scale, torch.bfloat16)
    return scale, stored_zero(-(middle - reach) / scale, settings)


def fit(group: list[float], settings: Settings) -> Pair:
    """From every start: rounds as long as each lowers the loss; the best of everything seen."""
    best, least = start(group, 1.0, settings), math.inf
    for share in settings.starts:
        pair, before = start(group, share, settings), math.inf
        for number in range(settings.steps + 1):
            now = loss(group, pair, settings.bits, settings.p)
            if now < least:
                best, least = pair, now
            if now >= before:
                break
            pair, before = step(group, pair, settings.beta * 1.01**number, settings), now
    return best


def snapped(group: list[float], pair: Pair, column_squares: list[float], bits: int) -> Pair:
    """The zero point rounded, if that lowers Σ (w - ŵ)²/column_square."""
    rounded = (pair[0], float(round(pair[1])))

    def relative(candidate: Pair) -> float:
        found = values(group, candidate, bits)
        return sum((w - v) ** 2 / c for w, v, c in zip(group, found, column_squares, strict=True))

    return rounded if relative(rounded) < relative(pair) else pair

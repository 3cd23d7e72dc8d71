"""Trellis codes and their best paths in plain loops and float64, by trying every stream of digits."""

import itertools
from statistics import NormalDist

from torch import Tensor

Stream = tuple[int, ...]


def values(bits: int, state_bits: int, spread: int, shuffle: int, width: float, fraction: int) -> list[float]:
    """The value of each state: the newest digit, exchanged by the older ones, picks a slice of the Gaussian."""
    older, kinds = 2 ** (state_bits - bits), 2**bits
    found = []
    for state in range(2**state_bits):
        history, newest = divmod(state, kinds)
        offset = (history * spread % older + 0.5) / older
        exchanged = newest ^ (history * shuffle % older * kinds // older)
        found.append(round(NormalDist().inv_cdf((exchanged + offset) / kinds) * width * fraction) / fraction)
    return found


def states(digits: Stream, before: Stream, bits: int, state_bits: int) -> list[int]:
    """Every step's state: the last `state_bits` bits of the stream so far, with `before` in front of it."""
    stream = 0
    for digit in before:
        stream = stream << bits | digit
    found = []
    for digit in digits:
        stream = stream << bits | digit
        found.append(stream % 2**state_bits)
    return found


def streams(bits: int, length: int) -> list[Stream]:
    """All there are."""
    return list(itertools.product(range(2**bits), repeat=length))


def least_error(x: Tensor, table: list[float], bits: int, state_bits: int, seam: Stream) -> float:
    """The least squared error of any stream that begins after the digits `seam` and ends with them."""
    target = x.double().tolist()
    best = float("inf")
    keep = (state_bits - bits) / bits  # digits of a state that are kept for the next one, perhaps not a whole number
    for digits in streams(bits, len(target)):
        path = states(digits, seam, bits, state_bits)
        ends = states(digits[-1:], seam + digits[:-1], bits, state_bits)[0] % 2 ** (state_bits - bits)
        starts = _number(seam, bits) % 2 ** (state_bits - bits)
        if keep and ends != starts:
            continue
        best = min(best, sum((table[s] - t) ** 2 for s, t in zip(path, target, strict=True)))
    return best


def _number(digits: Stream, bits: int) -> int:
    total = 0
    for digit in digits:
        total = total << bits | digit
    return total

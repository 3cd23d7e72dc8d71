"""Rotary positions, one pair of channels at a time in plain float64."""

import math


def turned(x: list[float], frequencies: list[float], position: int) -> list[float]:
    """One token's channels: those of pair i, a complex number, times exp(i · position · frequency)."""
    pairs, found = len(frequencies), list(x)
    for i, frequency in enumerate(frequencies):
        number = complex(x[i], x[i + pairs]) * complex(math.cos(position * frequency), math.sin(position * frequency))
        found[i], found[i + pairs] = number.real, number.imag
    return found

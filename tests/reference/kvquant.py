"""KVQuant's levels and outliers, one number at a time in plain float64.

A vector is a list of groups. Its `count` entries farthest from their group's mean are kept as float16; every group's
range is that of its other entries, and x is the level nearest to (x - min) / (max - min), or with uniform levels KIVI's
rounding.
"""

from itertools import accumulate, pairwise

from tests.reference.min_max import half

Groups = list[list[float]]


def extreme(groups: Groups, count: int) -> set[tuple[int, int]]:
    """Which entries are kept aside: (group, number in it)."""
    means = [sum(group) / len(group) for group in groups]
    found = [(abs(x - means[g]), (g, i)) for g, group in enumerate(groups) for i, x in enumerate(group)]
    return {place for _, place in sorted(found, reverse=True)[:count]}


def held(groups: Groups, bits: int, levels: list[float] | None, count: int) -> Groups:
    """A vector after packing and unpacking; levels None: evenly spaced."""
    aside, result = extreme(groups, count), []
    places = levels or [i / (2**bits - 1) for i in range(2**bits)]
    for g, group in enumerate(groups):
        rest = [x for i, x in enumerate(group) if (g, i) not in aside]
        if not rest:
            result.append([half(x) for x in group])
            continue
        low = half(min(rest))
        top = 1 if levels else 2**bits - 1
        span = top * max(half((max(rest) - low) / top), 2.0**-24)
        nearest = [min(places, key=lambda level, x=x: abs(level - (x - low) / span)) for x in group]
        result.append(
            [
                half(x) if (g, i) in aside else low + span * level
                for i, (x, level) in enumerate(zip(group, nearest, strict=True))
            ]
        )
    return result


def least_error(values: list[float], weights: list[float], count: int) -> float:
    """The least Σ weight·(value - nearest level)² of all choices of `count` levels: every cut of the sorted list."""
    pairs = sorted(zip(values, weights, strict=True))
    n = len(pairs)
    mass, moment, square = ([0.0, *accumulate(w * x**power for x, w in pairs)] for power in (0, 1, 2))

    def error(start: int, stop: int) -> float:
        weight, first = mass[stop] - mass[start], moment[stop] - moment[start]
        return square[stop] - square[start] - (first * first / weight if weight > 0 else 0.0)

    best = [0.0] + [float("inf")] * n
    for _ in range(count):
        best = [0.0] + [min(best[i] + error(i, j) for i in range(j)) for j in range(1, n + 1)]
    return best[n]


def error_of(values: list[float], weights: list[float], levels: list[float]) -> float:
    """Σ weight·(value - nearest level)²."""
    assert all(a <= b for a, b in pairwise(levels))
    return sum(w * min((x - level) ** 2 for level in levels) for x, w in zip(values, weights, strict=True))

"""Choosing and merging experts, token by token and pair by pair, from the papers' formulas."""

import math

from tests.reference.grids import Matrix


def saliencies(gates: Matrix, answers: list[Matrix]) -> list[float]:
    """REAP: mean of g·‖f(x)‖ of each expert over the tokens with a gate there; 0 without any.

    Args:
        gates: [tokens][experts], 0 where a token is not sent.
        answers: [experts][tokens][hidden].
    """
    found = []
    for expert, own in enumerate(answers):
        values = [row[expert] * math.hypot(*own[t]) for t, row in enumerate(gates) if row[expert] > 0]
        found.append(math.fsum(values) / len(values) if values else 0.0)
    return found


def means(answers: list[Matrix]) -> Matrix:
    """Each expert's mean answer."""
    return [[math.fsum(column) / len(own) for column in zip(*own, strict=True)] for own in answers]


def groups(points: Matrix, num_groups: int, linkage: str) -> list[list[int]]:
    """Agglomerative clustering by definition: all pairs of members are looked at again before every step."""
    found = [[i] for i in range(len(points))]

    def apart(a: list[int], b: list[int]) -> float:
        pairs = [math.dist(points[i], points[j]) for i in a for j in b]
        return {"average": math.fsum(pairs) / len(pairs), "complete": max(pairs), "single": min(pairs)}[linkage]

    while len(found) > num_groups:
        pairs = [(apart(a, b), i, j) for i, a in enumerate(found) for j, b in enumerate(found) if i < j]
        _, i, j = min(pairs)
        found[i] = sorted(found[i] + found.pop(j))
    return sorted(found)


def merged(group: list[int], counts: list[int]) -> list[float]:
    """HC-SMoE: what each of a group's experts weighs in what they become: its share of the group's tokens."""
    total = sum(counts[i] for i in group)
    return [counts[i] / total if total else 1 / len(group) for i in group]

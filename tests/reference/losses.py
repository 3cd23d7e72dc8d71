"""Losses on predictions, token by token and entry by entry in float64, as their papers write them."""

from math import exp, log

from torch import Tensor


def softmax(logits: list[float], temperature: float = 1.0) -> list[float]:
    top = max(logits)
    raw = [exp((z - top) / temperature) for z in logits]
    return [each / sum(raw) for each in raw]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * (log(a) - log(b)) for a, b in zip(p, q, strict=True))


def mix(p: list[float], q: list[float], share: float) -> list[float]:
    return [share * a + (1 - share) * b for a, b in zip(p, q, strict=True)]


FORMULAS = {
    "forward_kl": kl,
    "reverse_kl": lambda p, q: kl(q, p),
    "jeffreys": lambda p, q: kl(p, q) + kl(q, p),
    "jsd": lambda p, q: 0.3 * kl(p, mix(p, q, 0.3)) + 0.7 * kl(q, mix(p, q, 0.3)),
    "skew_kl": lambda p, q: kl(p, mix(p, q, 0.2)),
    "skew_reverse_kl": lambda p, q: kl(q, mix(p, q, 0.8)),
    "total_variation": lambda p, q: sum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2,
    "cakld": lambda p, q: 0.6 * kl(q, p) + 0.4 * kl(p, q),
}
"""Teacher's and student's probabilities of one token → loss, with the settings that the tests give."""


def top_k_kl(p: list[float], q: list[float], known: list[int]) -> float:
    """KL over the events "token i" for the known ones, and "any other"."""
    rest_p, rest_q = (1 - sum(each[i] for i in known) for each in (p, q))
    return sum(p[i] * log(p[i] / q[i]) for i in known) + rest_p * log(rest_p / rest_q)


def uld(p: list[float], q: list[float], label: int, weight: float) -> float:
    """Cross-entropy plus the distance of sorted probabilities, the shorter list filled with zeros."""
    size = max(len(p), len(q))
    high = sorted(p, reverse=True) + [0.0] * (size - len(p))
    own = sorted(q, reverse=True) + [0.0] * (size - len(q))
    return -log(q[label]) + weight * sum(abs(a - b) for a, b in zip(high, own, strict=True))


def minillm_rewards(log_ratios: list[float]) -> list[float]:
    """For each token of a text the mean of log(teacher / student) of the later tokens."""
    found = []
    for t in range(len(log_ratios)):
        later = log_ratios[t + 1 :]
        found.append(sum(later) / len(later) if later else 0.0)
    return found


def rows(tensor: Tensor) -> list[list[float]]:
    return [[float(each) for each in row] for row in tensor.double()]

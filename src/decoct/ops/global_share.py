"""How many units each group keeps when all of them compete: one threshold over standardised scores."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def global_share(scores: Sequence[Float[Tensor, " units"]], num_kept: int, step: int) -> list[int]:
    """Units that each group keeps: those of all groups together whose scores stand out most in their group.

    Scores are standardised group by group (FLAP, arXiv 2312.11983), since groups measure on scales of their own. Then
    the numbers above the common threshold are rounded down to multiples of `step`, and what that leaves over goes to
    those that lost most by it, so that the sum stays.

    Args:
        scores: of each group's units, any number of units each.
        num_kept: of all groups together; a multiple of `step`.
        step: what each group's number is a multiple of; at least one is kept.

    Raises:
        ValueError: scores that are not finite.
    """
    assert num_kept % step == 0, "else the sum could not be met in steps"
    if not all(torch.isfinite(each).all() for each in scores):
        raise ValueError("weights or activations hold NaN or infinite values; the checkpoint or the text is damaged")
    standard = [
        (each.double() - each.double().mean()) / each.double().std(correction=0).clamp(min=1e-300) for each in scores
    ]
    owner = torch.cat([torch.full((len(each),), group) for group, each in enumerate(standard)])
    best = torch.argsort(torch.cat(standard), descending=True, stable=True)[:num_kept]
    wanted = torch.bincount(owner[best], minlength=len(scores)).tolist()
    most = [len(each) // step * step for each in scores]
    found = [min(max(count // step * step, step), limit) for count, limit in zip(wanted, most, strict=True)]
    while sum(found) != num_kept:
        up = sum(found) < num_kept
        room = [g for g in range(len(found)) if (found[g] < most[g] if up else found[g] > step)]
        if not room:
            break
        chosen = max(room, key=lambda g: ((wanted[g] - found[g]) * (1 if up else -1), -g))
        found[chosen] += step if up else -step
    return found

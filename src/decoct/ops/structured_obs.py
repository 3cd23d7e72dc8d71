"""Structured OBS (arXiv 2302.04089): which groups of input features the remaining ones can do without best."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from decoct.ops.least_squares import DAMPING
from decoct.ops.linalg import damped_cholesky


class Removal(NamedTuple):
    """What goes.

    Attributes:
        gone: units, the first to go first; of one round, the least first.
        first_scores: of every unit when nothing has gone yet.
    """

    gone: Int[Tensor, " gone"]
    first_scores: Float[Tensor, " units"]


def removal_order(
    w: Float[Tensor, "out in"], H: Float[Tensor, "in in"], unit: int, num_gone: int, rounds: int
) -> Removal:
    """Take out units round after round, each time those that cost least once the others have made up for them.

    With P = (H + λ)⁻¹ and S the features of a unit, removing it costs tr(w_S·(P_SS)⁻¹·w_Sᵀ); then w and P become
    w - w_S·(P_SS)⁻¹·P_S: and P - P_:S·(P_SS)⁻¹·P_S:, whose rows and columns S are zero.

    Args:
        w: float32.
        H: symmetric, float32.
        unit: neighbouring features that go together; divides their number.
        num_gone: units to take out.
        rounds: at most so many; scores are exact at the start of each, all units of one round go at once.

    Raises:
        ValueError: H is not finite or cannot be factored.
    """
    lower, _ = damped_cholesky(H, DAMPING)
    P = torch.cholesky_inverse(lower)
    w = w.clone()
    num_units = w.shape[1] // unit
    left = torch.ones(num_units, dtype=torch.bool)
    gone: list[Tensor] = []
    first = scores = _scores(w, P, unit, left)
    for number in range(min(rounds, num_gone)):
        count = num_gone * (number + 1) // min(rounds, num_gone) - sum(map(len, gone))
        if number:
            scores = _scores(w, P, unit, left)
        chosen = scores.masked_fill(~left, torch.inf).argsort(stable=True)[:count]
        columns = (chosen.unsqueeze(1) * unit + torch.arange(unit)).reshape(-1)
        back = torch.linalg.solve(P[columns][:, columns], P[columns])  # (P_SS)⁻¹·P_S:
        w -= w[:, columns] @ back
        P -= P[:, columns] @ back
        left[chosen] = False
        gone.append(chosen)
    return Removal(torch.cat(gone) if gone else torch.empty(0, dtype=torch.long), first)


def _scores(w: Float[Tensor, "out in"], P: Float[Tensor, "in in"], unit: int, left: Tensor) -> Float[Tensor, " units"]:
    """What removing each unit that is left would cost."""
    if unit == 1:
        return w.square().sum(0) / torch.diagonal(P).clamp(min=torch.finfo(P.dtype).tiny)
    found = torch.full((len(left),), torch.inf)
    for number in left.nonzero()[:, 0].tolist():
        S = slice(number * unit, (number + 1) * unit)
        found[number] = (torch.linalg.solve(P[S, S], w[:, S].T) * w[:, S].T).sum()
    return found

"""Which entries of a matrix drop, given what each is worth: as many of every row, of every run, or of them all."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

_SHORT = 16  # entries of a run up to which comparing all pairs is faster than selecting in each run


@dataclass(frozen=True, slots=True)
class Pattern:
    """Of each run of consecutive entries, in row order, how many drop.

    A run is a row, a few entries of a row (an N:M pattern), or the whole matrix.

    Attributes:
        num_dropped: of each run.
        run: entries; divides a row, or is a multiple of it.
    """

    num_dropped: int
    run: int

    def survivors(
        self, score: Float[Tensor, "out in"], kept: Bool[Tensor, "out in"] | None = None
    ) -> Bool[Tensor, "out in"]:
        """True for all entries but the `num_dropped` of each run with the least score (ties: the later ones survive).

        Args:
            score: what each entry is worth; not negative, may be infinite.
            kept: False where an earlier step dropped an entry: it stays dropped, and counts.

        Raises:
            ValueError: a score is NaN.
        """
        if torch.isnan(score).any():
            raise ValueError(
                "the weights or the input statistics hold NaN or infinite values; check the model and the text"
            )
        if kept is not None:
            score = score.masked_fill(~kept, -1.0)
        if self.num_dropped == 0:
            found = torch.ones_like(score, dtype=torch.bool)
        else:
            runs = score.reshape(-1, self.run)
            choose = _by_rank if self.run <= _SHORT else _by_threshold
            found = choose(runs, self.num_dropped).reshape(score.shape)
        return found if kept is None else found & kept


def _by_rank(runs: Float[Tensor, "runs n"], num_dropped: int) -> Bool[Tensor, "runs n"]:
    """Entries that at least `num_dropped` others of their run come before."""
    columns = runs.T.contiguous()
    before = torch.zeros(columns.shape, dtype=torch.uint8, device=runs.device)
    for later in range(1, columns.shape[0]):
        for earlier in range(later):
            first = columns[earlier] <= columns[later]  # a tie: the earlier one comes first
            before[later] += first
            before[earlier] += ~first
    return (before >= num_dropped).T


def _by_threshold(runs: Float[Tensor, "runs n"], num_dropped: int) -> Bool[Tensor, "runs n"]:
    """Entries above the largest score that drops, and of those equal to it the last ones, as many as are missing."""
    limit = runs.kthvalue(num_dropped, dim=-1, keepdim=True).values
    found = runs > limit
    missing = runs.shape[1] - num_dropped - found.sum(-1, keepdim=True)
    if not missing.any():
        return found
    equal = runs == limit
    return found | (equal & (equal.flip(-1).cumsum(-1).flip(-1) <= missing))

"""Rounding groups of features with feedback, straight from what it minimises; float64."""

from collections.abc import Callable

import torch
from torch import Tensor


def block_feedback(w: Tensor, H: Tensor, group: int, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    """Round a group; move what is left of the matrix to where tr(E·H·Eᵀ) is least given the errors E so far; repeat.

    Args:
        w: [out, in].
        H: [in, in], positive definite.
        group: features a group.
        rounded: [out, group] -> [out, group].
    """
    w, H = w.double(), H.double()
    found = torch.empty_like(w)
    cols = w.shape[1]
    for start in range(0, cols, group):
        lost = w[:, :start] - found[:, :start]
        # The best error of the rest solves E_rest·H_rest + lost·H_lost,rest = 0.
        best = -lost @ H[:start, start:] @ torch.linalg.inv(H[start:, start:])
        stop = min(start + group, cols)
        found[:, start:stop] = rounded(w[:, start:stop] - best[:, : stop - start])
    return found

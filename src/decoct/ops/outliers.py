"""Which weights a group is better off without: the leave-one-out test of SpQR (arXiv 2306.03078)."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from decoct.ops.parallel import each_piece
from decoct.ops.two_level import span


def leave_one_out_gain(
    w: Float[Tensor, "rows cols"],
    importance: Float[Tensor, " cols"],
    *,
    bits: int,
    group_size: int,
    survivors: Bool[Tensor, "rows cols"] | None = None,
) -> Float[Tensor, "rows cols"]:
    """By how much Σ importance·(w - ŵ)² of an entry's group falls if the entry is stored apart.

    The group's grid spans what remains. Only its least and its largest entry change that span when they go; leaving out
    any other saves its own error and no more.

    Args:
        w: float32, finite.
        importance: of each column.
        bits: of the grid.
        group_size: divides `cols`.
        survivors: False for entries that are pruned: they take no part, and their gain is zero.
    """
    rows, cols = w.shape
    top = 2**bits - 1
    weight = importance.reshape(-1, group_size)
    gains = torch.empty_like(w)

    def work(part: slice) -> None:
        values = w[part].reshape(-1, cols // group_size, group_size)
        used = torch.ones_like(values, dtype=torch.bool)
        if survivors is not None:
            used = survivors[part].reshape(values.shape)
        error = _error(values, used, weight, top)
        before = error.sum(-1, keepdim=True)
        gain = error.clone()
        masked = torch.where(used, values, 0)
        for entry in (masked.argmin(-1, keepdim=True), masked.argmax(-1, keepdim=True)):
            others = used.scatter(-1, entry, value=False)
            saved = before - _error(values, others, weight, top).sum(-1, keepdim=True)
            gain.scatter_(-1, entry, torch.where(used.gather(-1, entry), saved, 0))
        gains[part] = gain.reshape(-1, cols)

    each_piece(work, rows, cols, w.device)
    return gains


def _error(values: Tensor, used: Tensor, weight: Tensor, top: int) -> Tensor:
    """Weighted squared error of each used entry on the grid that spans the used ones."""
    low, high = span(values, used)
    scale = high / top - low / top
    scale = torch.where(scale == 0, 1.0, scale).unsqueeze(-1)
    zero = (-low.unsqueeze(-1) / scale).round_().clamp_(0, top)
    step = values.div(scale).round_().add_(zero).clamp_(0, top).sub_(zero)
    return torch.where(used, step.mul_(scale).sub_(values).square_().mul_(weight), 0)

"""Optimal brain surgeon, row by row (arXiv 2208.11580): remove the cheapest weight, move the others, and again."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from decoct.ops.linalg import inverse_factor, revived
from decoct.ops.sparsity import Pattern

_AT_ONCE = 1 << 20  # entries of inverse Hessians worked on at a time: they fit the cache


def surgeon(
    w: Float[Tensor, "out in"],
    H: Float[Tensor, "in in"],
    pattern: Pattern,
    *,
    kept: Bool[Tensor, "out in"] | None = None,
    damping: float = 0.01,
) -> tuple[Float[Tensor, "out in"], Bool[Tensor, "out in"]]:
    """What is left of a matrix, and which entries survive.

    A row's next entry to go is that of least w_p²/[H⁻¹]_pp; the others change by -w_p/[H⁻¹]_pp·[H⁻¹]_p, and H⁻¹ loses
    feature p. Where the pattern spans rows, rows are emptied first, and the steps that cost least are then taken. All
    those changes come to the least-squares solution on what survives, which is computed anew at the end.

    Args:
        w: any float dtype; features that never fired count as zero.
        H: symmetric.
        pattern: how many entries of which runs drop.
        kept: False where an earlier step dropped an entry; those go first, and count.
        damping: fraction of the mean diagonal added to H; raised if the factorization fails.

    Raises:
        ValueError: H is not finite or cannot be factored.
    """
    H = H.double()
    dead = torch.diagonal(H) == 0
    H = revived(H)
    upper, used = inverse_factor(H, damping)
    inverse = upper.T @ upper
    target = w.double().masked_fill(dead, 0.0)
    alive = torch.ones(w.shape, dtype=torch.bool) if kept is None else kept
    width = w.shape[1]
    survivors = torch.empty(w.shape, dtype=torch.bool)
    costs = torch.empty(w.shape, dtype=torch.float64)
    order = torch.empty(w.shape, dtype=torch.int64)
    rows_at_once = max(1, _AT_ONCE // width**2)
    steps = width if pattern.run > width else width // pattern.run * pattern.num_dropped
    for start in range(0, w.shape[0], rows_at_once):
        rows = slice(start, start + rows_at_once)
        costs[rows], order[rows] = _remove(target[rows], inverse, alive[rows], pattern, steps)
    if pattern.run > width:
        dropped = ~pattern.survivors(costs.cummax(1).values)
    else:
        dropped = (torch.arange(width) < steps).expand(w.shape)
    survivors.scatter_(1, order, ~dropped)
    survivors &= alive
    H = H + used * torch.diagonal(H).mean() * torch.eye(width, dtype=H.dtype)
    return _solve(target, H, survivors, rows_at_once).float(), survivors


def _remove(
    w: Tensor, inverse: Tensor, kept: Bool[Tensor, "rows in"], pattern: Pattern, steps: int
) -> tuple[Float[Tensor, "rows in"], Int[Tensor, "rows in"]]:
    """Remove so many entries of each row, one by one: what each cost, -1 if it was gone before, and which it was.

    Entries that stay follow in no particular order.
    """
    count, width = w.shape
    inverse = inverse.expand(count, width, width).clone()
    each = torch.arange(count)
    w, gone = w.clone(), torch.zeros(w.shape, dtype=torch.bool)
    costs, order = torch.full_like(w, torch.inf), torch.empty(w.shape, dtype=torch.int64)
    runs = width // min(pattern.run, width)
    for step in range(steps):
        diagonal = inverse.diagonal(dim1=1, dim2=2)
        full = gone.reshape(count, runs, -1).sum(2, keepdim=True) >= min(pattern.num_dropped, width)
        barred = gone | (full & (runs > 1)).expand(count, runs, width // runs).reshape(count, width)
        cost = (w.square() / diagonal).masked_fill_(~kept, -1.0).masked_fill_(barred, torch.inf)
        costs[:, step], chosen = cost.min(1)
        order[:, step] = chosen
        line, pivot = inverse[each, chosen], diagonal[each, chosen].unsqueeze(1)
        w.addcmul_(line, w[each, chosen].unsqueeze(1) / pivot, value=-1.0)
        inverse.baddbmm_((line / pivot).unsqueeze(2), line.unsqueeze(1), alpha=-1.0)
        gone[each, chosen] = True
        w[gone] = 0.0
    order[:, steps:] = torch.argsort(gone.to(torch.uint8), dim=1, stable=True)[:, : width - steps]
    return costs, order


def _solve(w: Tensor, H: Tensor, survivors: Bool[Tensor, "out in"], rows_at_once: int) -> Float[Tensor, "out in"]:
    """The values on the survivors that minimise tr((w - ŵ)·H·(w - ŵ)ᵀ)."""
    wanted = (w @ H) * survivors
    found = torch.empty_like(w)
    for start in range(0, w.shape[0], rows_at_once):
        rows = slice(start, start + rows_at_once)
        mine = survivors[rows].double()
        system = H * mine.unsqueeze(2) * mine.unsqueeze(1) + torch.diag_embed(1.0 - mine)
        found[rows] = torch.linalg.solve(system, wanted[rows])
    return found * survivors

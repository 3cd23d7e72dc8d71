"""Two vectors for a matrix of signs: w ≈ signs ⊙ (rows · columnsᵀ), as it stands or as the inputs see it."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from decoct.ops.linalg import damped_cholesky

_MOST_STEPS = 100
_ENOUGH = 1e-7  # relative change of the vectors at which alternating stops
_DAMPING = 1e-4  # of each feature's own weight: what the inputs do not tell apart stays where it was
_TINY = torch.finfo(torch.float32).tiny


def best_rank_one(
    size: Float[Tensor, "out in"], mask: Bool[Tensor, "out in"] | None = None
) -> tuple[Float[Tensor, " out"], Float[Tensor, "in"]]:
    """Vectors a, b ≥ 0 that minimise Σ (size_ij - a_i·b_j)² over the entries that are there.

    Alternating least squares from b = the columns' means. Without a mask that is power iteration, and gives the first
    singular pair, which for a non-negative matrix is non-negative (Perron-Frobenius).

    Args:
        size: not negative.
        mask: True for the entries that count; None: all.

    Returns:
        a and b, float32, with b's mean 1 (or 0, if everything is).
    """
    there = size if mask is None else size * mask
    rows, columns = there.new_zeros(size.shape[0]), there.mean(0)
    for _ in range(_MOST_STEPS):
        before = rows
        rows = _solve(there @ columns, columns, None if mask is None else mask.float())
        columns = _solve(there.T @ rows, rows, None if mask is None else mask.T.float())
        columns = columns / columns.mean().clamp(min=_TINY)
        if float((rows - before).norm()) <= _ENOUGH * float(rows.norm()):
            break
    return _solve(there @ columns, columns, None if mask is None else mask.float()), columns


def fit_rows(
    w: Float[Tensor, "out in"], H: Float[Tensor, "in in"], units: Float[Tensor, "out in"], columns: Float[Tensor, "in"]
) -> Float[Tensor, " out"]:
    """For each row the factor a with the least output error of w - a · unit ⊙ columns; 0 where nothing is seen."""
    scaled = units * columns
    outputs = scaled @ H
    square = (outputs * scaled).sum(1)
    return torch.where(square > 0, (outputs * w).sum(1) / square.clamp(min=_TINY), 0.0)


def fit_columns(
    w: Float[Tensor, "out in"],
    H: Float[Tensor, "in in"],
    units: Float[Tensor, "out in"],
    rows: Float[Tensor, " out"],
    columns: Float[Tensor, "in"],
) -> Float[Tensor, "in"]:
    """The column factors with the least output error Σ_i (w_i - a_i·unit_i ⊙ b)·H·(…)ᵀ over all rows i together.

    With V = diag(a)·units the normal equations are (H ⊙ VᵀV)·b = diagonal of Vᵀ·w·H. They are solved for the change
    from `columns`, lightly damped.
    """
    scaled = units * rows.unsqueeze(1)
    normal = H * (scaled.T @ scaled)
    wanted = (scaled * (w @ H)).sum(0)
    root = torch.diagonal(normal).sqrt()
    root = torch.where(root > 0, root, 1.0)
    lower, _ = damped_cholesky(normal / root / root.unsqueeze(1), _DAMPING)
    missing = (wanted - normal @ columns) / root
    return columns + torch.cholesky_solve(missing.unsqueeze(1), lower).squeeze(1) / root


def _solve(products: Float[Tensor, " n"], other: Float[Tensor, " m"], mask: Float[Tensor, "n m"] | None) -> Tensor:
    """One side of alternating least squares."""
    square = other.square()
    return products / (square.sum() if mask is None else mask @ square).clamp(min=_TINY)

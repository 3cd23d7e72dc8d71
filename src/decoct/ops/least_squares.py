"""A matrix refitted to some of its input features, so that its outputs on given inputs change least."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from decoct.ops.linalg import damped_cholesky

DAMPING = 0.01
"""Fraction of the mean diagonal that is added to the diagonal."""


def refit_columns(
    w: Float[Tensor, "out in"],
    H: Float[Tensor, "in in"],
    kept: Int[Tensor, " kept"],
    mean: Float[Tensor, " in"] | None = None,
    damping: float = DAMPING,
) -> Float[Tensor, "out kept"]:
    """The V that minimises E‖w·x - V·x[kept]‖², with a ridge towards w[:, kept].

    With D the features that go: V = w[:, kept] + w[:, D]·H[D, kept]·(H[kept, kept] + λ)⁻¹.

    Args:
        w: float32.
        H: 2·E[x·xᵀ], float32.
        kept: features that stay.
        mean: E[x], if outputs may be shifted by a constant afterwards; None: they may not.
        damping: of the mean of the diagonal.

    Raises:
        ValueError: H is not finite or cannot be factored.
    """
    if mean is not None:
        H = H - 2.0 * torch.outer(mean, mean)
    gone = torch.ones(w.shape[1], dtype=torch.bool)
    gone[kept] = False
    if not gone.any():
        return w[:, kept]
    lower, _ = damped_cholesky(H[kept][:, kept], damping)
    moved = H[kept][:, gone] @ w[:, gone].T
    return w[:, kept] + torch.cholesky_solve(moved, lower).T

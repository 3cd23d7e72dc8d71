"""Reduced-rank ridge regression: the linear map of a given rank that predicts outputs from inputs best."""

import torch
from jaxtyping import Float
from torch import Tensor

from decoct.ops.linalg import damped_cholesky


def ridge(
    gram: Float[Tensor, "in in"], cross: Float[Tensor, "out in"], damping: float
) -> tuple[Float[Tensor, "out in"], float]:
    """B = C·(G + λ·I)⁻¹: the M that minimises Σ ‖t - M·a‖² + λ·‖M‖², with G = Σ a·aᵀ and C = Σ t·aᵀ.

    Args:
        gram: G, symmetric positive semidefinite.
        cross: C, of the same dtype.
        damping: λ as a fraction of the mean of G's diagonal; more of it if G cannot be factored otherwise.

    Returns:
        B, and the damping that was used.

    Raises:
        ValueError: G holds NaN or infinite values, or cannot be factored.
    """
    lower, used = damped_cholesky(gram, damping)
    return torch.cholesky_solve(cross.T, lower).T, used


def reduced_rank_ridge(
    gram: Float[Tensor, "in in"], cross: Float[Tensor, "out in"], rank: int, damping: float
) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
    """U and V such that M = U·V minimises what `ridge` minimises among all maps of this rank.

    Of any M the objective is a constant plus ‖(M - B)·(G + λ·I)^½‖², so M is the best approximation of B in that
    metric: B projected on the leading eigenvectors of B·(G + λ·I)·Bᵀ = B·Cᵀ, [out, out] (Izenman, 1975).

    Args:
        gram: see `ridge`.
        cross: see `ridge`.
        rank: at most min(out, in).
        damping: see `ridge`.

    Returns:
        U, whose columns are orthonormal, in falling order of what they explain; and V = Uᵀ·B.

    Raises:
        ValueError: as for `ridge`, or C holds NaN or infinite values.
    """
    full, _ = ridge(gram, cross, damping)
    explained = full.double() @ cross.double().T
    if not torch.isfinite(explained).all():
        raise ValueError("the outputs to be predicted hold NaN or infinite values; check the model and the text")
    _, vectors = torch.linalg.eigh((explained + explained.T) / 2)
    U = vectors[:, -rank:].flip(1).to(full.dtype)
    return U, U.T @ full

"""Factorizations of Gram matrices that survive rank deficiency: damping is raised, in the open, until they succeed."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

_MAX_RETRIES = 12
_RETRY_FACTOR = 4.0


class InverseFactor(NamedTuple):
    """Upper triangular U with Uᵀ·U = (H + damping·mean(diag H)·I)⁻¹, and the damping that was needed."""

    upper: Float[Tensor, "n n"]
    damping: float


def revived(H: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """A copy of a Gram matrix in which features that never fired are as large as the others are on average.

    So they can be factored, and do not change the mean diagonal, which damping is a fraction of, whatever the scale.
    Where nothing ever fired it is the identity.

    Args:
        H: symmetric positive semidefinite.
    """
    H = H.clone()
    diagonal = torch.diagonal(H)
    dead = diagonal == 0
    diagonal[dead] = 1.0 if dead.all() else diagonal[~dead].mean()
    return H


def inverse_factor(H: Float[Tensor, "n n"], damping: float) -> InverseFactor:
    """Factor the inverse of a symmetric positive semidefinite matrix without forming the inverse.

    With J the reversal permutation and J·H·J = L·Lᵀ, the matrix J·L·J is upper triangular and its inverse is U.
    That is one Cholesky factorization and one triangular inversion, and loses less precision than inverting first.

    Args:
        H: symmetric, float32 or float64; rows and columns in the order in which they will be eliminated.
        damping: fraction of the mean diagonal that is added to the diagonal; multiplied by 4 until it suffices.

    Raises:
        ValueError: H holds NaN or infinite values, or no damping helps.
    """
    n = H.shape[0]
    flipped = H.flip(0, 1).contiguous()
    lower, used = damped_cholesky(flipped, damping)
    triangle = lower.flip(0, 1)
    eye = torch.eye(n, dtype=H.dtype, device=H.device)
    return InverseFactor(torch.linalg.solve_triangular(triangle, eye, upper=True), used)


def damped_cholesky(H: Float[Tensor, "n n"], damping: float) -> tuple[Float[Tensor, "n n"], float]:
    """Lower Cholesky factor of H + damping·mean(diag H)·I, and the damping used.

    Raises:
        ValueError: H holds NaN or infinite values, or is not positive definite even with heavy damping.
    """
    diagonal = torch.diagonal(H)
    mean = diagonal.mean()
    if not torch.isfinite(mean):
        raise ValueError("the input statistics hold NaN or infinite values; check the model and the calibration text")
    mean = mean.clamp(min=torch.finfo(H.dtype).tiny)
    used = damping
    for _ in range(_MAX_RETRIES):
        damped = H.clone()
        torch.diagonal(damped).add_(used * mean)
        lower, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0 and bool(torch.isfinite(lower).all()):
            return lower, used
        used = max(used * _RETRY_FACTOR, 1e-6)
    raise ValueError(f"the input statistics are not positive definite even with damping {used:.1e}")

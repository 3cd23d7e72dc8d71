"""The best low-rank approximation of a matrix as its inputs see it."""

import torch
from jaxtyping import Float
from torch import Tensor

from decoct.ops.linalg import damped_cholesky

_DAMPING = 1e-6  # of the mean eigenvalue: inputs that never vary still get a finite inverse


def whitened_low_rank(
    w: Float[Tensor, "out in"], gram: Float[Tensor, "in in"] | None, rank: int
) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
    """A and B that minimise ‖(w - A·B)·S‖ where S·Sᵀ is the inputs' Gram matrix (the identity if None).

    With w·S = U·Σ·Vᵀ the answer is A = U_r·Σ_r^½, B = Σ_r^½·V_rᵀ·S⁻¹ (arXiv 2403.07378). U or V comes from the
    eigenvectors of the smaller of the two products (w·S)(w·S)ᵀ and (w·S)ᵀ(w·S), in float64; for the former,
    U_r·U_rᵀ·w needs no S⁻¹ at all.

    Args:
        w: any float dtype.
        gram: positive semidefinite, any scale.
        rank: at most min(out, in).

    Returns:
        A and B, float32, with the singular values shared evenly between them.

    Raises:
        ValueError: the matrix or the Gram matrix is not finite.
    """
    W = w.double()
    size = W.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
    if not torch.isfinite(size):
        raise ValueError("the weights hold NaN or infinite values; the checkpoint is damaged")
    W = W / size
    rows, cols = W.shape
    G = torch.eye(cols, dtype=torch.float64, device=W.device) if gram is None else gram.double()
    typical = torch.diagonal(G).mean()
    if typical == 0:  # no input ever fired: every approximation is as good, so take the plain one
        G, typical = torch.eye(cols, dtype=torch.float64, device=W.device), torch.ones_like(typical)
    S, _ = damped_cholesky(G / typical, _DAMPING)
    WS = W @ S
    if rows <= cols:
        values, vectors = torch.linalg.eigh(WS @ WS.T)
        U, sigma = _leading(values, vectors, rank)
        A, B = U, U.T @ W
    else:
        values, vectors = torch.linalg.eigh(WS.T @ WS)
        V, sigma = _leading(values, vectors, rank)
        A = WS @ V / sigma
        B = sigma[:, None] * torch.linalg.solve_triangular(S, V.T, upper=False, left=False)
    # Here A has orthonormal columns and B carries the singular values: share them.
    root = sigma.sqrt()
    shared = size.sqrt()
    return (A * root * shared).float(), (B / root[:, None] * shared).float()


def _leading(values: Tensor, vectors: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The `rank` eigenvectors with the largest eigenvalues, and the singular values (never zero)."""
    top = values[-rank:].flip(0)
    floor = values[-1].clamp(min=torch.finfo(values.dtype).tiny) * torch.finfo(values.dtype).eps
    return vectors[:, -rank:].flip(1), top.clamp(min=floor).sqrt()

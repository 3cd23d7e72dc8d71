"""The best low-rank approximation as the inputs see it: SVD-LLM's way and EoRA's way, with full float64 SVDs."""

import math

import torch
from torch import Tensor

from tests.reference.grids import Matrix


def cholesky(A: Matrix) -> Matrix:
    """Lower L with L·Lᵀ = A, by Cholesky and Banachiewicz's row recurrence."""
    n = len(A)
    L = [[0.0] * n for _ in range(n)]
    for i in range(n):
        for j in range(i + 1):
            rest = A[i][j] - sum(L[i][k] * L[j][k] for k in range(j))
            L[i][j] = math.sqrt(rest) if i == j else rest / L[j][j]
    return L


def svd_llm(w: Tensor, gram: Tensor, rank: int) -> tuple[Tensor, float]:
    """A·B and its error ‖(w - A·B)·S‖_F: S = chol(gram), w·S = U·Σ·Vᵀ, A = U·Σ^½, B = Σ^½·Vᵀ·S⁻¹."""
    S = torch.tensor(cholesky(gram.double().tolist()), dtype=torch.float64)
    U, sigma, Vt = torch.linalg.svd(w.double() @ S, full_matrices=False)
    A = U[:, :rank] * sigma[:rank].sqrt()
    B = sigma[:rank].sqrt()[:, None] * Vt[:rank] @ torch.linalg.inv(S)
    return A @ B, float(sigma[rank:].square().sum().sqrt())


def eora(lost: Tensor, gram: Tensor, rank: int) -> tuple[Tensor, float]:
    """A·B and its error: XXᵀ = Q·Λ·Qᵀ, lost·Q·Λ^½ = U·Σ·Vᵀ, A = U·Σ, B = Vᵀ·Λ^-½·Qᵀ."""
    eigenvalues, Q = torch.linalg.eigh(gram.double())
    root = eigenvalues.sqrt()
    U, sigma, Vt = torch.linalg.svd(lost.double() @ Q * root, full_matrices=False)
    return (U[:, :rank] * sigma[:rank]) @ (Vt[:rank] / root @ Q.T), float(sigma[rank:].square().sum().sqrt())


def error(lost: Tensor, gram: Tensor) -> float:
    """‖lost·S‖_F with S·Sᵀ = gram."""
    D = lost.double()
    return math.sqrt(max(0.0, float((D @ gram.double() * D).sum())))

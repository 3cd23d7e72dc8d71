"""Rotations and the Cayley transform, written from their formulas, in float64."""

import torch
from torch import Tensor

from decoct.ops.hadamard import hadamard, random_signs


def randomised_hadamard(n: int, seed: int) -> Tensor:
    """H·diag(signs), column by column."""
    signs = random_signs(n, seed).double()
    columns = []
    for i in range(n):
        unit = torch.zeros(n, dtype=torch.float64)
        unit[i] = signs[i]
        columns.append(hadamard(unit))
    return torch.stack(columns, 1)


def cayley(q: Tensor, gradient: Tensor, rate: float) -> Tensor:
    """(I + rate/2·Y)⁻¹ (I - rate/2·Y) q with Y = Ĝ - Ĝᵀ and Ĝ = G·qᵀ - q·qᵀ·G·qᵀ/2."""
    q, gradient = q.double(), gradient.double()
    hat = gradient @ q.T - 0.5 * q @ (q.T @ gradient @ q.T)
    y, eye = hat - hat.T, torch.eye(len(q), dtype=torch.float64)
    return torch.linalg.inv(eye + rate / 2 * y) @ (eye - rate / 2 * y) @ q

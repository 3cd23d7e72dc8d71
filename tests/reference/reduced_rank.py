"""Reduced-rank ridge regression the slow way: alternating least squares on the data themselves, in float64."""

import torch
from torch import Tensor


def objective(inputs: Tensor, targets: Tensor, ridge: float, M: Tensor) -> float:
    """Σ over tokens of ‖t - M·a‖², and ridge·‖M‖²; float64."""
    total = ridge * float(M.double().square().sum())
    for a, t in zip(inputs.double(), targets.double(), strict=True):
        total += float((t - M.double() @ a).square().sum())
    return total


def full_map(inputs: Tensor, targets: Tensor, ridge: float) -> Tensor:
    """The M with the least objective: ordinary least squares on the data with √ridge·I appended, by an SVD."""
    width = inputs.shape[1]
    stacked = torch.cat([inputs.double(), ridge**0.5 * torch.eye(width, dtype=torch.float64)])
    wanted = torch.cat([targets.double(), torch.zeros(width, targets.shape[1], dtype=torch.float64)])
    return (torch.linalg.pinv(stacked) @ wanted).T


def best_of_rank(inputs: Tensor, targets: Tensor, ridge: float, rank: int, steps: int = 400) -> Tensor:
    """A map of this rank with the least objective, by alternating least squares from a few random beginnings.

    With U fixed (orthonormal columns), V is the full map to Uᵀ·t; with V fixed, U is the full map from V·a, its ridge
    being that of the product.
    """
    best, least = torch.zeros(targets.shape[1], inputs.shape[1], dtype=torch.float64), float("inf")
    for seed in range(3):
        drawn = torch.randn(targets.shape[1], rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        U = torch.linalg.qr(drawn).Q
        for _ in range(steps):
            V = full_map(inputs, targets.double() @ U, ridge)
            seen = inputs.double() @ V.T
            normal = seen.T @ seen + ridge * V @ V.T
            U = torch.linalg.qr(targets.double().T @ seen @ torch.linalg.inv(normal)).Q
        M = U @ full_map(inputs, targets.double() @ U, ridge)
        found = objective(inputs, targets, ridge, M)
        if found < least:
            best, least = M, found
    return best

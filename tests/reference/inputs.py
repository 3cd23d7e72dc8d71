"""Seeded matrices and inputs that the references and the code under test are both given."""

import torch
from torch import Tensor


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Independent normal entries."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def correlated(tokens: int, width: int, seed: int = 0) -> Tensor:
    """Inputs whose features share a few directions and differ in size, as a language model's do: [tokens, width]."""
    shared = gaussian(tokens, max(1, width // 4), seed=seed) @ gaussian(max(1, width // 4), width, seed=seed + 1)
    size = torch.linspace(-1.0, 1.0, width).exp()[torch.randperm(width, generator=torch.Generator().manual_seed(seed))]
    return (shared + 0.3 * gaussian(tokens, width, seed=seed + 2)) * size


def hessian(x: Tensor) -> Tensor:
    """H = (2/N) Σ x xᵀ, float64."""
    return 2.0 / x.shape[0] * x.double().T @ x.double()


def output_error(lost: Tensor, x: Tensor) -> float:
    """Mean squared output error of a change of the weight, in its trace form tr(D·H·Dᵀ)."""
    D = lost.double()
    return float((D @ hessian(x) @ D.T).trace())


def heavy(out: int, cols: int) -> torch.Tensor:
    """A matrix with a few large entries and rows of different sizes, as a model's are."""
    w = gaussian(out, cols, seed=1) * torch.linspace(-1, 1, out).exp()[:, None]
    w[5, 7], w[40, 99] = 12.0, -9.0
    return w

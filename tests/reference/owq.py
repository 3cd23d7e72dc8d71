"""OWQ in float64: which columns are weak, and what becomes of them once the others are rounded."""

import torch
from torch import Tensor

from tests.reference.gptq import inverse


def weakness(w: Tensor, H: Tensor, rounded: Tensor) -> list[float]:
    """H_jj·Σ_i (w_ij - ŵ_ij)² of each column."""
    lost = (w.double() - rounded.double()).tolist()
    return [float(H[j, j]) * sum(row[j] ** 2 for row in lost) for j in range(w.shape[1])]


def best_kept(w: Tensor, quantized: Tensor, kept: list[int], H: Tensor) -> Tensor:
    """The kept columns that minimise tr(D·H·Dᵀ), D = ŵ - w, when the others are `quantized`.

    D_k = -D_q·H_qk·H_kk⁻¹, the normal equations.
    """
    rest = [j for j in range(w.shape[1]) if j not in kept]
    D = quantized.double()[:, rest] - w.double()[:, rest]
    Hkk = torch.tensor(inverse(H[kept][:, kept].double().tolist()), dtype=torch.float64)
    return w.double()[:, kept] - D @ H[rest][:, kept].double() @ Hkk

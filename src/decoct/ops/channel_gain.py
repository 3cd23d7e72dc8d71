"""One factor for each input channel of some matrices, by least squares: what a norm's gain can make up for."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from decoct.ops.linalg import damped_cholesky


def channel_gains(
    readers: Sequence[Float[Tensor, "out in"]],
    wanted: Sequence[Float[Tensor, "out in"]],
    H: Float[Tensor, "in in"],
    cross: Float[Tensor, "in in"],
    damping: float,
) -> Float[Tensor, " in"]:
    """The factors s that minimise Σ over readers R and tokens of ‖R·(s∘x) - W·y‖².

    The normal equations are ((Σ RᵀR) ∘ Σ x·xᵀ)·s = diag((Σ RᵀW)·Σ y·xᵀ). The matrix on the left is positive
    semidefinite, as an elementwise product of two such matrices is. What the data do not determine stays near 1.

    Args:
        readers: the matrices as they have become.
        wanted: the same as they were; what they made of y is the target.
        H: Σ x·xᵀ, x the inputs as they have become.
        cross: Σ y·xᵀ, y the inputs as they were.
        damping: what holds a factor at 1, as a fraction of the left side's mean diagonal.

    Raises:
        ValueError: numbers that are not finite.
    """
    width = H.shape[0]
    own, both = (torch.zeros(width, width, dtype=torch.float64) for _ in range(2))
    for reader, before in zip(readers, wanted, strict=True):
        became = reader.double()
        own += became.T @ became
        both += became.T @ before.double()
    left = own.mul_(H.double())
    right = both.mul_(cross.double().T).sum(1)
    lower, used = damped_cholesky(left, damping)
    ridge = used * torch.diagonal(left).mean()
    factors: Tensor = torch.cholesky_solve((right + ridge).unsqueeze(1), lower)[:, 0]
    return factors.float()

"""Descent among orthogonal matrices: a step along the Cayley transform never leaves them (arXiv 2002.01113)."""

import torch
from jaxtyping import Float
from torch import Tensor


def cayley_step(
    matrix: Float[Tensor, "n n"], gradient: Float[Tensor, "n n"], rate: float
) -> tuple[Float[Tensor, "n n"], float]:
    """A step of gradient descent: (I + a/2·Y)⁻¹ (I - a/2·Y) Q, with Y = (G·Qᵀ - Q·Gᵀ)/2.

    Y is half of what turns Q infinitesimally towards larger losses. As it is skew-symmetric, the factor before Q is
    orthogonal whatever the step. The step a is at most `rate`, and at most 1 over the largest column sum of |Y|, so
    that no step turns by much more than a radian.

    Args:
        matrix: Q, orthogonal, float64.
        gradient: G, of the loss by each entry of Q.
        rate: learning rate.

    Returns:
        The new matrix, and the step that was taken.
    """
    product = gradient.double() @ matrix.T
    skew = (product - product.T) / 2
    size = float(skew.abs().sum(0).max())
    step = min(rate, 1.0 / size) if size > 0 else 0.0
    half = skew.mul_(step / 2)
    eye = torch.eye(len(half), dtype=half.dtype)
    return torch.linalg.solve(eye + half, matrix - half @ matrix), step

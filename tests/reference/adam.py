"""Adam entry by entry in plain float64, from the paper's algorithm."""

from collections.abc import Sequence
from math import sqrt

from torch import Tensor


def adam(value: Tensor, gradients: Sequence[Tensor], rates: Sequence[float], betas: tuple[float, float]) -> Tensor:
    """Where a tensor has moved to after these gradients; ε is zero, and entries whose gradients are all zero stay."""
    out = value.double().flatten()
    steps = [gradient.double().flatten().tolist() for gradient in gradients]
    for entry in range(out.numel()):
        x, mean, square = float(out[entry]), 0.0, 0.0
        for number, (gradient, rate) in enumerate(zip(steps, rates, strict=True), 1):
            g = gradient[entry]
            mean = betas[0] * mean + (1 - betas[0]) * g
            square = betas[1] * square + (1 - betas[1]) * g * g
            if square > 0:
                x -= rate * (mean / (1 - betas[0] ** number)) / sqrt(square / (1 - betas[1] ** number))
        out[entry] = x
    return out.reshape(value.shape)

"""Least squares with few non-zero entries (arXiv 2406.07831): splitting finds the support, conjugate gradients refit.

Both take inputs scaled so that their Gram matrix has a unit diagonal: entries' sizes then do not depend on those of
their features, and the diagonal is no longer needed as a preconditioner.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Choice = Callable[[Float[Tensor, "out in"]], Bool[Tensor, "out in"]]
"""Size of entries -> which of them survive."""

_EVERY = 3  # steps between two looks at the support
_GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))  # support that changed, more than this part: rho grows by this factor
_SHRINK, _SMALLEST = 0.2, 1e-4  # of rho while nothing changes at all yet


def sparse_support(
    w: Float[Tensor, "out in"], H: Float[Tensor, "in in"], choose: Choice, *, rho: float = 0.1, num_steps: int = 300
) -> tuple[Float[Tensor, "out in"], Bool[Tensor, "out in"]]:
    """A support, and values on it, for which tr((w - d)·H·(w - d)ᵀ) is small, by the alternating direction method.

    b minimises the loss and a pull of strength rho towards d, d is the best of b (and what the two still owe each
    other) within the pattern; rho grows until the support no longer changes.

    Args:
        w: float32.
        H: float32, positive definite, unit diagonal.
        choose: the pattern.
        rho: at the start.
        num_steps: at most.

    Returns:
        d and its support.
    """
    values, Q = torch.linalg.eigh(H.double())
    values, Q = values.clamp(min=0).float(), Q.float()
    target = w @ H
    support = choose(w.abs())
    d, owed = w * support, torch.zeros_like(w)
    before, wanted, moved = support, int(support.sum()), False
    inverse = (Q / (values + rho)) @ Q.T
    for step in range(1, num_steps + 1):
        b = torch.add(target - owed, d, alpha=rho) @ inverse
        sought = torch.add(b, owed, alpha=1 / rho)
        support = choose(sought.abs())
        d = sought * support
        owed = torch.sub(sought, d).mul_(rho)  # owed + rho·(b - d)
        if step % _EVERY:
            continue
        changed = int((support != before).sum())
        before = support
        if changed:
            moved = True
            rho *= next(factor for part, factor in _GROWTH if changed > part * wanted)
        elif moved or rho < _SMALLEST:
            break
        else:
            rho *= _SHRINK  # so strong a pull that nothing could move
        inverse = (Q / (values + rho)) @ Q.T
    return d, support


def refit(
    w: Float[Tensor, "out in"],
    H: Float[Tensor, "in in"],
    start: Float[Tensor, "out in"],
    support: Bool[Tensor, "out in"],
    num_steps: int,
) -> Float[Tensor, "out in"]:
    """Values on a support that lower tr((w - d)·H·(w - d)ᵀ), by conjugate gradients, each row on its own.

    Args:
        w: float32.
        H: float32, positive definite, unit diagonal.
        start: values to start from; zero outside of the support.
        support: where values may be other than zero.
        num_steps: no step makes a row worse; as many as the support has entries in a row solve it.
    """
    d = start.clone()
    residual = ((w - d) @ H) * support
    direction = residual
    size = residual.square().sum(1, keepdim=True)
    for _ in range(num_steps):
        image = (direction @ H) * support
        steepness = (direction * image).sum(1, keepdim=True)
        length = torch.where(steepness > 0, size / steepness, 0.0)
        d += length * direction
        residual = residual - length * image
        new_size = residual.square().sum(1, keepdim=True)
        direction = residual + torch.where(size > 0, new_size / size, 0.0) * direction
        size = new_size
    return d

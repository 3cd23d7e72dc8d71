"""ALPS (arXiv 2406.07831): find what survives by splitting the least-squares problem, then solve for its values."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from decoct.methods.pruning import Pruning
from decoct.ops.admm import refit, sparse_support
from decoct.stats import Gram
from decoct.weights import Weight


@dataclass(frozen=True, slots=True, kw_only=True)
class ALPS(Pruning):
    """Prune with the Gram matrix of the layer's inputs, all features at once: the best of the family, and slower.

    It pays where much is pruned, at 60 % and more. See Pruning for the settings that are not named here.

    Attributes:
        damping: fraction of the Hessian's mean diagonal added to it.
        rho: at the start: how strongly values and pattern are pulled together; it grows until the pattern is stable.
        num_steps: at most, of that search.
        refit_steps: of conjugate gradients on the pattern that was found.
    """

    scope: str = "layer"
    damping: float = 0.01
    rho: float = 0.1
    num_steps: int = 300
    refit_steps: int = 10

    stat: ClassVar[type[Gram]] = Gram

    def __post_init__(self) -> None:
        Pruning.__post_init__(self)
        if not 0 < self.damping <= 1:
            raise ValueError(f"damping must be above 0 and at most 1, not {self.damping}")
        if self.rho <= 0:
            raise ValueError(f"rho must be positive, not {self.rho}")
        if self.num_steps < 1 or self.refit_steps < 0:
            raise ValueError("num_steps must be at least 1, refit_steps 0 or more")

    def workspace(self, shape: tuple[int, int]) -> int:
        """Some ten matrices in float32 and what ranking takes; the Hessian, its eigenvectors and its inverse."""
        return 64 * shape[0] * shape[1] + 48 * shape[1] ** 2

    def operations(self, shape: tuple[int, int]) -> float:
        """A product and a ranking in each of some hundred steps, an inverse in every third; the eigenvectors."""
        out, cols = shape
        steps = min(self.num_steps, 120)
        each = 2.0 * out * cols**2 + 0.7 * cols**3 + 300.0 * out * cols
        return steps * each + 4.0 * (self.refit_steps + 3) * out * cols**2 + 40.0 * cols**3

    def compress(self, weight: Weight, stat: Gram) -> Weight:
        """Prune; what was pruned stays pruned."""
        return self.refit(weight, lambda w, kept: self._prune(w, kept, stat), "alps")

    def _prune(
        self, w: Float[Tensor, "out in"], kept: Bool[Tensor, "out in"] | None, stat: Gram
    ) -> tuple[Float[Tensor, "out in"], Bool[Tensor, "out in"]]:
        H, size = scaled_hessian(stat.matrix(), self.damping)
        dead = torch.diagonal(stat.total) == 0
        largest = w.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
        target = (w / largest).masked_fill(dead, 0.0) * size
        pattern = self.pattern((w.shape[0], w.shape[1]))

        def choose(score: Float[Tensor, "out in"]) -> Bool[Tensor, "out in"]:
            return pattern.survivors(score, kept)

        def loss(values: Float[Tensor, "out in"]) -> float:
            lost = values - target
            return float(((lost @ H) * lost).sum())

        # Where features hardly interact the search may end no better than it began; so its beginning is refitted too.
        first = choose(target.abs())
        starts = sparse_support(target, H, choose, rho=self.rho, num_steps=self.num_steps), (target * first, first)
        ends = [(refit(target, H, start, mask, self.refit_steps), mask) for start, mask in starts]
        values, survivors = min(ends, key=lambda end: loss(end[0]))
        return values / size * largest, survivors


def scaled_hessian(H: Float[Tensor, "in in"], damping: float) -> tuple[Float[Tensor, "in in"], Float[Tensor, " in"]]:
    """H, damped, with rows and columns divided by the root of its diagonal; and that root.

    Raises:
        ValueError: H is not finite.
    """
    mean = torch.diagonal(H).mean()
    if not torch.isfinite(H).all():
        raise ValueError("the input statistics hold NaN or infinite values; check the model and the calibration text")
    added = damping * mean if mean > 0 else torch.ones(())
    damped = H + added * torch.eye(H.shape[0])
    size = torch.diagonal(damped).sqrt()
    return damped / size / size.unsqueeze(1), size

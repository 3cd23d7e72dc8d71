"""E2E-QP (EfficientQAT, arXiv 2407.11062): tune scales and norms of a compressed model end to end, codes fixed."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from decoct.methods.base import ModelMethod

_LEAST_UNIT = 0.1  # of a tensor's root mean square: entries near zero may still move
_BETAS, _EPS = (0.9, 0.95), 1e-8


@dataclass(frozen=True, slots=True, kw_only=True)
class E2EQP(ModelMethod):
    """Make the compressed model's predictions those of the model that the recipe began with.

    Every real number that a compressed matrix stores is tuned (scales, low-rank factors, surviving values), in the
    blocks, the embedding and lm_head, and so are norms and biases, against the KL divergence of the two models'
    next-token distributions on the calibration text. Integer codes, zero points, masks, and matrices that were left
    uncompressed stay, so the size does not change. The paper trains the blocks' scales on labels; the uncompressed
    model's own distribution says more per token. The whole model must fit in memory.

    Attributes:
        num_steps: gradient steps.
        batch_size: sequences in each.
        learning_rate: largest relative change of an entry in one step, about; decays to zero along a cosine.
        norms: tune the norms' gains, the final one's included, and biases too.
        seed: of the order in which sequences are seen.
    """

    num_steps: int = 128
    batch_size: int = 1
    learning_rate: float = 2e-3
    norms: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_steps < 1 or self.batch_size < 1:
            raise ValueError("num_steps and batch_size must be at least 1")
        if not 0 < self.learning_rate < 1:
            raise ValueError("learning_rate must lie between 0 and 1: it is relative to each entry's size")

    def rate(self, step: int) -> float:
        """The learning rate of a step: a short rise, then a cosine down to zero."""
        rise = min(1.0, (step + 1) / max(1.0, 0.1 * self.num_steps))
        turn = torch.pi * step / self.num_steps
        return self.learning_rate * rise * 0.5 * (1.0 + float(torch.cos(torch.tensor(turn))))


def unit(tensor: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The size of each entry, in which its changes are counted, float32."""
    values = tensor.float()
    floor = _LEAST_UNIT * values.square().mean().sqrt().clamp(min=torch.finfo(torch.float32).tiny)
    return values.abs().clamp(min=floor)


class RelativeAdam:
    """Adam (arXiv 1412.6980) on many tensors, each entry's changes counted in units of its own size.

    Scales of different matrices, factors and norms differ by orders of magnitude; so one learning rate fits all.

    Attributes:
        state: changes so far and the two moments, float32, as `{kind: {name: tensor}}`; save and put back its tensors
            to go on later.
    """

    def __init__(self, first: Mapping[str, Float[Tensor, "*shape"]]) -> None:
        """Begin at these tensors, any float dtype."""
        self._first = dict(first)
        self._units = {name: unit(tensor) for name, tensor in first.items()}
        kinds = ("moved", "mean", "square")
        self.state = {kind: {name: torch.zeros_like(u) for name, u in self._units.items()} for kind in kinds}

    def __contains__(self, name: str) -> bool:
        """Whether a tensor is tuned."""
        return name in self._first

    def value(self, name: str) -> Float[Tensor, "*shape"]:
        """A tensor as it would be stored now, in its own dtype."""
        first = self._first[name]
        return (first.float() + self.state["moved"][name] * self._units[name]).to(first.dtype)

    def step(self, gradients: Mapping[str, Float[Tensor, "*shape"]], number: int, rate: float) -> None:
        """Move along the gradients, float32, by name; `number` counts steps from 0.

        Raises:
            ValueError: a gradient is not finite.
        """
        fade = [1.0 - beta ** (number + 1) for beta in _BETAS]
        for name, gradient in gradients.items():
            if not torch.isfinite(gradient.sum()):
                raise ValueError(f"the gradient of {name} is not finite; lower e2e_qp.learning_rate")
            g = gradient * self._units[name]
            mean, square = self.state["mean"][name], self.state["square"][name]
            mean.lerp_(g, 1.0 - _BETAS[0])
            square.lerp_(g.square(), 1.0 - _BETAS[1])
            self.state["moved"][name].sub_(rate * (mean / fade[0]) / ((square / fade[1]).sqrt() + _EPS))

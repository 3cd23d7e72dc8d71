"""E2E-QP (EfficientQAT, arXiv 2407.11062): tune scales and norms of a compressed model end to end, codes fixed."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from decoct.methods.base import ModelMethod

_LEAST_UNIT = 0.1  # of a tensor's root mean square: entries near zero may still move


@dataclass(frozen=True, slots=True, kw_only=True)
class E2EQP(ModelMethod):
    """Make the compressed model's predictions those of the model that the recipe began with.

    Everything stored as real numbers is tuned (scales, low-rank factors, surviving values, norms) against the KL
    divergence of the two models' next-token distributions on the calibration text; integer codes and masks stay, so
    the size does not change. The paper trains on labels; the uncompressed model's own distribution says more per
    token. The whole model must fit in memory.

    Attributes:
        num_steps: gradient steps.
        batch_size: sequences in each.
        learning_rate: largest relative change of an entry in one step, about; decays to zero along a cosine.
        norms: tune the norms' gains (and other vectors inside the blocks) too.
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


def divergence(
    logits: Float[Tensor, "tokens vocab"], teacher: Float[Tensor, "tokens vocab"]
) -> tuple[float, Float[Tensor, "tokens vocab"]]:
    """Sum over tokens of KL(teacher ‖ student), and its gradient by the student's logits.

    Both softmaxes are taken in float32; the gradient, softmax(student) - softmax(teacher), needs no graph.
    """
    own = torch.log_softmax(logits.float(), dim=-1)
    wanted = torch.log_softmax(teacher.float(), dim=-1)
    chances = wanted.exp()
    loss = float((chances * (wanted - own)).sum())
    return loss, own.exp_().sub_(chances)

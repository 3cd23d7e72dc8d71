"""Block-AP of EfficientQAT (arXiv 2407.11062): train a block's rounded weights, scales and zero points."""

from dataclasses import dataclass
from math import cos, pi
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from decoct.methods.block_learning import BlockLearning
from decoct.methods.learned_grid import Latent, Start
from decoct.ops.adam import Adam
from decoct.ops.rounding import clipped_codes, grid_gradients
from decoct.weights import GroupInt

_SCALE_RATE = 0.1  # a scale's relative step, in steps of a weight
_ZERO_RATE = 0.5  # a zero point's step, in steps of a weight
_SCALE_RANGE = 0.7  # of its logarithm, from the scale that was found before
_LEAST_RATE = 0.05  # of the first learning rate, at the end: the paper's 1/20


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockAP(BlockLearning):
    """Train everything that makes up a block's rounded weights so that the block's output changes least.

    The weights themselves are trained, in float32 for as long as the block is worked on, rounded in every step; and
    with them scales and, where there are some, zero points. Nothing holds a weight near the code it began with, which
    pays at 2 and 3 bits and takes more calibration text than learned rounding does. Works on what an earlier step
    quantized and starts from its codes; slots that no earlier step quantized are rounded first if `bits` is given.
    `e2e_qp` is the paper's second phase.

    Attributes:
        bits: 2 to 8, for slots that are not quantized yet; None leaves those alone.
        group_size: input features that share a scale, or "channel", for the same.
        symmetric: no zero points, for the same.
        num_steps: gradient steps.
        batch_size: sequences in each.
        learning_rate: first step size, in codes; None is 1.5 / num_steps. It decays to a twentieth along a cosine.
        seed: of the order in which sequences are seen.
    """

    key: ClassVar[str] = "block_ap"
    path: ClassVar[float] = 1.5
    state_bytes: ClassVar[int] = 12
    step_operations: ClassVar[float] = 80.0

    @override
    def rate(self, step: int) -> float:
        first = self.path / self.num_steps if self.learning_rate is None else self.learning_rate
        return first * (_LEAST_RATE + (1.0 - _LEAST_RATE) * 0.5 * (1.0 + cos(pi * step / self.num_steps)))

    @override
    def latent(self, weight: GroupInt, wanted: Float[Tensor, "out in"]) -> Latent:
        return _Trained(Start.of(weight), wanted)


class _Trained(Latent):
    """Weights counted in scales of the start, logarithms of scales, and zero points."""

    def __init__(self, begun: Start, wanted: Float[Tensor, "out in"]) -> None:
        self._begun = begun
        self._learned = {"weights": begun.position(wanted), "scale": torch.zeros_like(begun.scale)}
        if not begun.weight.symmetric:
            self._learned["zero"] = begun.zero.clone()
        self._adam = Adam(self._learned)

    @override
    def values(self) -> Float[Tensor, "out in"]:
        scale = self._scale()
        return self._codes(scale).mul_(scale).reshape(self._begun.weight.shape)

    @override
    def move(self, gradient: Float[Tensor, "out in"], rate: float) -> None:
        scale = self._scale()
        ratio = self._begun.scale / scale
        position = self._learned["weights"] * ratio
        limits = self._begun.limits(self._zero())
        found = grid_gradients(gradient.reshape(position.shape), position, scale, *limits)
        gradients = {"weights": found.position.mul_(ratio), "scale": found.log_scale, "zero": found.zero}
        rates = {"weights": rate, "scale": _SCALE_RATE * rate, "zero": _ZERO_RATE * rate}
        self._adam.step(self._learned, gradients, rates)
        self._learned["scale"].clamp_(-_SCALE_RANGE, _SCALE_RANGE)

    @override
    def weight(self) -> GroupInt:
        scale = self._scale()
        return self._begun.packed(self._codes(scale), scale, self._zero())

    def _scale(self) -> Tensor:
        return self._begun.stored(self._begun.scale * self._learned["scale"].exp())

    def _zero(self) -> Tensor:
        """A whole code of the grid."""
        if "zero" not in self._learned:
            return self._begun.zero
        return self._learned["zero"].round().clamp_(0, 2**self._begun.weight.bits - 1)

    def _codes(self, scale: Tensor) -> Tensor:
        """Counted from zero."""
        position = self._learned["weights"] * (self._begun.scale / scale)
        return clipped_codes(position, *self._begun.limits(self._zero()))

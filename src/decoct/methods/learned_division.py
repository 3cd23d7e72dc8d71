"""Codes as rounded quotients, weight / (scale · divisor), with a divisor for each weight: FlexRound and LRQ."""

from abc import abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from decoct.methods.learned_grid import Latent, Start
from decoct.ops.adam import Adam
from decoct.ops.rounding import clipped_codes, grid_gradients
from decoct.weights import GroupInt

_SCALE = "scale"
_SCALE_RATE = 0.25  # a scale's relative step, in steps of a divisor: it moves a whole group
_SCALE_RANGE = 0.5  # of its logarithm, from the scale that was found before


class Division(Latent):
    """A grid whose codes are round(w / (scale · exp(log_divisor))); scales and log divisors are learned by Adam.

    Quotients make large weights move further than small ones, and never change a sign. Logarithms keep divisors and
    scales positive, and make one learning rate fit all. All begin at zero, where the codes are those of the start.

    Attributes:
        begun: the grid as it was found.
        learned: what Adam moves, by name.
    """

    def __init__(self, begun: Start, wanted: Float[Tensor, "out in"], learned: dict[str, Tensor]) -> None:
        """`learned` is what the divisors are made of, at the start."""
        self.learned = {**learned, _SCALE: torch.zeros_like(begun.scale)}
        self.begun = begun
        self._weights = begun.position(wanted)  # in units of the scales of the start
        self._adam = Adam(self.learned)

    @abstractmethod
    def log_divisor(self) -> Float[Tensor, "#out #groups #size"]:
        """Of each weight."""

    @abstractmethod
    def pull(self, gradient: Float[Tensor, "out groups size"]) -> dict[str, Tensor]:
        """Gradients of what the divisors are made of, given those of the log divisors."""

    @override
    def values(self) -> Float[Tensor, "out in"]:
        scale = self._scale()
        return self._codes(scale).mul_(scale).reshape(self.begun.weight.shape)

    @override
    def move(self, gradient: Float[Tensor, "out in"], rate: float) -> None:
        scale = self._scale()
        position = self._position(scale)
        limits = self.begun.limits(self.begun.zero)
        found = grid_gradients(gradient.reshape(position.shape), position, scale, *limits)
        pulled = {**self.pull(found.position.mul_(position).neg_()), _SCALE: found.log_scale}
        rates = {name: _SCALE_RATE * rate if name == _SCALE else rate for name in self.learned}
        self._adam.step(self.learned, pulled, rates)
        self.learned[_SCALE].clamp_(-_SCALE_RANGE, _SCALE_RANGE)

    @override
    def weight(self) -> GroupInt:
        scale = self._scale()
        return self.begun.packed(self._codes(scale), scale, self.begun.zero)

    def _scale(self) -> Tensor:
        return self.begun.stored(self.begun.scale * self.learned[_SCALE].exp())

    def _position(self, scale: Tensor) -> Tensor:
        return self.log_divisor().neg().exp().mul(self.begun.scale / scale).mul(self._weights)

    def _codes(self, scale: Tensor) -> Tensor:
        """Counted from zero."""
        return clipped_codes(self._position(scale), *self.begun.limits(self.begun.zero))

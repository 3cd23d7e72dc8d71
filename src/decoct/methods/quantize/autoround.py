"""AutoRound / SignRound (arXiv 2309.05516, 2512.04746): learn which way to round, by signed gradient steps."""

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from decoct.methods.block_learning import BlockLearning
from decoct.methods.learned_grid import NEAREST, Latent, Start
from decoct.ops.parallel import each_piece
from decoct.ops.rounding import clipped_codes, rounding_gradients
from decoct.weights import GroupInt

_HALF = 0.5  # a weight may move to the neighbouring code, not beyond
_SCALE_RATE = 0.25  # a scale's relative step, in steps of a weight
_SCALE_RANGE = (0.5, 1.5)  # of the scale that was found before


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoRound(BlockLearning):
    """Improve the codes and scales of a block's integer weights so that the block's output changes least.

    Works on what an earlier step quantized, whatever its bits, and starts from its codes: `linear` with gptq first is
    better than starting from plain rounding. Slots that no earlier step quantized are rounded first if `bits` is given.
    The error of a token counts relative to the size of its hidden state, since the next norm divides by that.

    Attributes:
        bits: 2 to 8, for slots that are not quantized yet; None leaves those alone.
        group_size: input features that share a scale, or "channel", for the same.
        symmetric: no zero points, for the same.
        num_steps: gradient steps.
        batch_size: sequences in each.
        learning_rate: first step size, in codes; None is 0.75 / num_steps. It decays to zero.
        learn_scale: whether scales are learned too.
        seed: of the order in which sequences are seen.
    """

    key: ClassVar[str] = "autoround"
    path: ClassVar[float] = 0.75
    state_bytes: ClassVar[int] = 8
    step_operations: ClassVar[float] = 40.0

    learn_scale: bool = True

    @override
    def latent(self, weight: GroupInt, wanted: Float[Tensor, "out in"]) -> Latent:
        return _Latent.of(weight, wanted, learn_scale=self.learn_scale)


@dataclass(slots=True)
class _Latent(Latent):
    """Integer codes on their way: where each weight lies between codes, and each group's scale.

    The scale is learned apart from the codes: a position stays where it is when its scale changes.

    Attributes:
        before: the codes and scales that it started with.
        position: where each weight lies, in codes counted from zero.
        start: where it lay; it may move half a code from there.
        first: the scales that it started with.
        factor: what they are multiplied by.
        zero: zero points.
        learn_scale: whether scales are learned too.
    """

    before: GroupInt
    position: Float[Tensor, "out groups size"]
    start: Float[Tensor, "out groups size"]
    first: Float[Tensor, "out groups 1"]
    factor: Float[Tensor, "out groups 1"]
    zero: Float[Tensor, "out groups 1"]
    learn_scale: bool

    @classmethod
    def of(cls, weight: GroupInt, wanted: Float[Tensor, "out in"], *, learn_scale: bool) -> Self:
        """Start where the codes are, as near to what is wanted as those codes allow."""
        begun = Start.of(weight)
        scale, zero = (each.expand(weight.shape[0], -1, -1) for each in (begun.scale, begun.zero))
        codes = begun.codes()
        start = (wanted.reshape(codes.shape) / scale).clamp_(codes - NEAREST, codes + NEAREST)
        return cls(weight, start.clone(), start, scale.clone(), torch.ones_like(scale), zero, learn_scale)

    @override
    def values(self) -> Float[Tensor, "out in"]:
        out = torch.empty_like(self.position)

        def work(part: slice) -> None:
            torch.mul(self._codes(part), self._scale(part), out=out[part])

        each_piece(work, *self.before.shape)
        return out.reshape(self.before.shape)

    @override
    def move(self, gradient: Float[Tensor, "out in"], rate: float) -> None:
        g = gradient.reshape(self.position.shape)
        own_scales = self.before.scale.shape[0] == self.before.shape[0]  # each row has some; the matrix not one in all

        def work(part: slice) -> None:
            position, start = self.position[part], self.start[part]
            by_position, by_scale = rounding_gradients(g[part], position, self._scale(part), *self._limits(part))
            if self.learn_scale and own_scales:
                moved = self.factor[part] - _SCALE_RATE * rate * (by_scale * self.first[part]).sign()
                self.factor[part] = moved.clamp_(*_SCALE_RANGE)
            self.position[part] = (position - rate * by_position.sign()).clamp_(start - _HALF, start + _HALF)

        each_piece(work, *self.before.shape)

    @override
    def weight(self) -> GroupInt:
        everything = slice(0, self.before.shape[0])
        codes = (self._codes(everything) + self.zero).to(torch.uint8).reshape(self.before.shape)
        grid = self.before.grid()
        if grid.scale.shape[0] == self.before.shape[0]:
            grid = replace(grid, scale=self._scale(everything).squeeze(-1).to(grid.scale.dtype))
        return GroupInt.of(codes, grid, self.before.dtype)

    def _scale(self, part: slice) -> Tensor:
        """Rounded to what will be stored."""
        return (self.first[part] * self.factor[part]).to(self.before.scale.dtype).float()

    def _limits(self, part: slice) -> tuple[Tensor, Tensor]:
        """Least and greatest code, counted from zero."""
        return -self.zero[part], 2**self.before.bits - 1 - self.zero[part]

    def _codes(self, part: slice) -> Tensor:
        """Codes counted from zero."""
        return clipped_codes(self.position[part], *self._limits(part))

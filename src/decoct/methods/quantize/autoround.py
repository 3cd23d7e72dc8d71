"""AutoRound / SignRound (arXiv 2309.05516, 2512.04746): learn which way to round, by signed gradient steps."""

from dataclasses import dataclass
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
_SCALE_RATE, _SLOW_SCALE_RATE = 1.0, 0.25  # a scale's relative step, in steps of a weight
_ALMOST_ALL = 0.99  # of the weights have the nearest code: it was found by rounding them
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
    state_bytes: ClassVar[int] = 12
    step_operations: ClassVar[float] = 40.0

    learn_scale: bool = True

    @override
    def latent(self, weight: GroupInt, wanted: Float[Tensor, "out in"]) -> Latent:
        return _Latent.of(weight, wanted, learn_scale=self.learn_scale)


@dataclass(slots=True)
class _Latent(Latent):
    """Integer codes on their way: code = clip(round(following / scale + offset)); scale and offset are learned.

    Where weights start at the code that is nearest to it, the weights follow their scale: when it moves, they lie
    elsewhere among the codes and are rounded anew. Codes that an earlier step chose otherwise, as GPTQ does to make up
    for errors elsewhere, are not to be lost that way: there nothing follows, and scales move slowly.

    Attributes:
        begun: the grid that it started with.
        following: the weights, or zeros.
        offset: what is added before rounding.
        first: where each offset started; it may move half a code from there.
        factor: what the first scales are multiplied by.
        scale_rate: a factor's step, in steps of an offset; 0: scales stay.
    """

    begun: Start
    following: Float[Tensor, "out groups size"]
    offset: Float[Tensor, "out groups size"]
    first: Float[Tensor, "out groups size"]
    factor: Float[Tensor, "out groups 1"]
    scale_rate: float

    @classmethod
    def of(cls, weight: GroupInt, wanted: Float[Tensor, "out in"], *, learn_scale: bool) -> Self:
        """Start at the codes that are there."""
        begun = Start.of(weight)
        entries, codes, factor = wanted.reshape(begun.shape), begun.codes(), torch.ones_like(begun.scale)
        exact = entries / begun.scale
        nearest = clipped_codes(exact, *begun.limits(begun.zero)) == codes
        if nearest.float().mean() > _ALMOST_ALL:
            following, first, rate = entries, begun.position(wanted) - exact, _SCALE_RATE
        else:
            following, rate = torch.zeros(()).expand(begun.shape), _SLOW_SCALE_RATE
            first = exact.clamp_(codes - NEAREST, codes + NEAREST)
        if not learn_scale or factor.shape[0] != begun.shape[0]:  # the matrix has one scale in all
            rate = 0.0
        return cls(begun, following, first.clone(), first, factor, rate)

    @override
    def values(self) -> Float[Tensor, "out in"]:
        out = torch.empty_like(self.offset)

        def work(part: slice) -> None:
            scale = self._scale(part)
            torch.mul(self._codes(part, scale), scale, out=out[part])

        each_piece(work, *self.begun.weight.shape)
        return out.reshape(self.begun.weight.shape)

    @override
    def move(self, gradient: Float[Tensor, "out in"], rate: float) -> None:
        g = gradient.reshape(self.offset.shape)

        def work(part: slice) -> None:
            offset, first, scale = self.offset[part], self.first[part], self._scale(part)
            center, limits = self.following[part] / scale, self._limits(part)
            by_offset, by_scale = rounding_gradients(g[part], center, offset, scale, *limits)
            if self.scale_rate:
                moved = (
                    self.factor[part] - self.scale_rate * rate * (by_scale * scale).sign()
                )  # a scale may be negative
                self.factor[part] = moved.clamp_(*_SCALE_RANGE)
            self.offset[part] = (offset - rate * by_offset.sign()).clamp_(first - _HALF, first + _HALF)

        each_piece(work, *self.begun.weight.shape)

    @override
    def weight(self) -> GroupInt:
        everything = slice(0, self.begun.shape[0])
        scale = self._scale(everything)
        return self.begun.packed(self._codes(everything, scale), scale, self.begun.zero)

    def _scale(self, part: slice) -> Tensor:
        """Rounded to what will be stored."""
        return self.begun.stored(_rows(self.begun.scale, part) * _rows(self.factor, part))

    def _limits(self, part: slice) -> tuple[Tensor, Tensor]:
        """Least and greatest code, counted from zero."""
        return self.begun.limits(_rows(self.begun.zero, part))

    def _codes(self, part: slice, scale: Tensor) -> Tensor:
        """Codes counted from zero."""
        return clipped_codes((self.following[part] / scale).add_(self.offset[part]), *self._limits(part))


def _rows(x: Float[Tensor, "rows groups 1"], part: slice) -> Float[Tensor, "some groups 1"]:
    """Some rows; the only one if it is for all."""
    return x if x.shape[0] == 1 else x[part]

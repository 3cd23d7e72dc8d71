"""OmniQuant's learnable weight clipping (arXiv 2308.13137): learn where each group's grid ends."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from decoct.methods.block_learning import BlockLearning
from decoct.methods.learned_grid import Latent, Start
from decoct.ops.adam import Adam
from decoct.ops.rounding import clipped_codes, grid_gradients
from decoct.ops.span import span_gradients, span_grid
from decoct.weights import GroupInt

_MOST = 0.982  # part of a group's extreme that the grid reaches at the start, at most: the paper's sigmoid(4)
_LEAST = 1e-3  # and at least
_HIGH, _LOW = "high", "low"


@dataclass(frozen=True, slots=True, kw_only=True)
class OmniQuant(BlockLearning):
    """Learn where each group's grid ends so that a block's output changes least.

    Two numbers a group (one, if the grid is symmetric) decide which part of the group's largest and smallest weight the
    grid covers; weights are rounded to the nearest code. So little is learned that little calibration text is needed.
    Slots that no earlier step quantized are rounded first if `bits` is given. What an earlier step quantized is
    improved from its codes; after feedback such as gptq's that is little: other scales undo what feedback had arranged.
    The paper's other half, scales of channels, is `omniquant_let`, a step before this one.

    Attributes:
        bits: 2 to 8, for slots that are not quantized yet; None leaves those alone.
        group_size: input features that share a scale, or "channel", for the same.
        symmetric: no zero points, for the same.
        num_steps: gradient steps.
        batch_size: sequences in each.
        learning_rate: first step size, of the logit of the covered part; None is 16 / num_steps. It decays to zero.
        seed: of the order in which sequences are seen.
    """

    key: ClassVar[str] = "omniquant"
    path: ClassVar[float] = 16.0
    state_bytes: ClassVar[int] = 5
    step_operations: ClassVar[float] = 50.0

    @override
    def latent(self, weight: GroupInt, wanted: Float[Tensor, "out in"]) -> Latent:
        return _Clipped(Start.of(weight), wanted)


class _Clipped(Latent):
    """The logits of which part of a group's extremes its grid covers; a negative scale stays negative."""

    def __init__(self, begun: Start, wanted: Float[Tensor, "out in"]) -> None:
        self._begun = begun
        self._sign = begun.scale.sign()
        self._weights = begun.position(wanted).mul_(begun.scale)
        top, symmetric = 2**begun.weight.bits - 1, begun.weight.symmetric
        over = 2 if begun.scale.shape[0] == begun.weight.shape[0] else (0, 2)
        low, high = self._weights.amin(over, keepdim=True), self._weights.amax(over, keepdim=True)
        tiny = torch.finfo(torch.float32).tiny
        if symmetric:
            now = {_HIGH: begun.scale.abs() * (top / 2)}
            extremes = {_HIGH: torch.maximum(high, -low)}
        else:
            now = {_HIGH: begun.scale * (top - begun.zero), _LOW: begun.scale * begun.zero}
            extremes = {_HIGH: high, _LOW: -low}
        # A grid may reach beyond the extremes, where an earlier step rounded its zero point.
        self._reach = {name: torch.maximum(extremes[name], now[name] / _MOST).clamp_(min=tiny) for name in now}
        self._logits = {name: (now[name] / self._reach[name]).clamp_(_LEAST, _MOST).logit() for name in now}
        self._adam = Adam(self._logits)

    @override
    def values(self) -> Float[Tensor, "out in"]:
        scale, zero = self._grid()
        return self._codes(scale, zero).mul_(scale).reshape(self._begun.weight.shape)

    @override
    def move(self, gradient: Float[Tensor, "out in"], rate: float) -> None:
        scale, zero = self._grid()
        position = self._weights / scale
        found = grid_gradients(gradient.reshape(position.shape), position, scale, *self._begun.limits(zero))
        ends, bits = self._ends(), self._begun.weight.bits
        of_ends = span_gradients(found.log_scale / scale.abs(), found.zero, ends[_HIGH], ends.get(_LOW), bits)
        gradients = {}
        for name, of_end in zip((_HIGH, _LOW), of_ends, strict=True):
            if name in ends:
                gradients[name] = of_end * ends[name] * (1.0 - self._logits[name].sigmoid())
        self._adam.step(self._logits, gradients, dict.fromkeys(self._logits, rate))

    @override
    def weight(self) -> GroupInt:
        scale, zero = self._grid()
        return self._begun.packed(self._codes(scale, zero), scale, zero)

    def _ends(self) -> dict[str, Tensor]:
        """Sizes of the grid's largest and smallest value."""
        return {name: self._logits[name].sigmoid() * self._reach[name] for name in self._logits}

    def _grid(self) -> tuple[Tensor, Tensor]:
        """Scale as it would be stored, and zero point."""
        ends = self._ends()
        scale, zero = span_grid(ends[_HIGH], ends.get(_LOW), self._begun.weight.bits)
        return self._begun.stored(scale * self._sign), zero

    def _codes(self, scale: Tensor, zero: Tensor) -> Tensor:
        """Counted from zero."""
        return clipped_codes(self._weights / scale, *self._begun.limits(zero))

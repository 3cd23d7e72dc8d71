"""AutoRound / SignRound (arXiv 2309.05516, 2512.04746): learn which way to round, by signed gradient steps."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from typing_extensions import override

from decoct.methods.base import BlockMethod, BlockWeights, Passage, quantize_structure
from decoct.ops.grid import Grid, check_grid, fit_grid, quantize_packed, resolve_group_size, stored_scale_dtype
from decoct.ops.parallel import each_piece
from decoct.weights import FloatBlock, GroupInt, Masked, Weight

_HALF = 0.5  # a weight may move to the neighbouring code, not beyond
_SCALE_RANGE = (0.5, 1.5)  # of the scale that was found before
_LOOKS = 4  # times that the error is measured on the way, to keep the best
_LOOKED_AT = 32  # sequences that it is measured on
_AT_ONCE = 4  # of them


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoRound(BlockMethod):
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
        learning_rate: first step size, in codes; None is 1 / num_steps, so that a weight can move by half a code.
        learn_scale: whether scales are learned too.
        seed: of the order in which sequences are seen.
    """

    bits: int | None = None
    group_size: int | str = 64
    symmetric: bool = True
    num_steps: int = 64
    batch_size: int = 8
    learning_rate: float | None = None
    learn_scale: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.bits is not None:
            check_grid(self.bits, self.group_size)
        if self.num_steps < 1 or self.batch_size < 1:
            raise ValueError("num_steps and batch_size must be at least 1")

    @override
    def begin(self, weight: Weight) -> Weight:
        if self.bits is None or not _is_dense(weight):
            return weight
        return quantize_structure(weight, None, self._rounded, "autoround")

    @override
    def touches(self, *, dense: bool) -> bool:
        return not dense or self.bits is not None

    @override
    def check(self, shape: tuple[int, int]) -> None:
        if self.bits is not None:
            resolve_group_size(self.group_size, shape[1])

    @override
    def operations(self, entries: int, num_sequences: int, length: int) -> float:
        forward = 2.0 * entries * length
        learned = 3 * self.num_steps * min(self.batch_size, num_sequences)
        return forward * (learned + (_LOOKS + 1) * num_sequences) + 40.0 * entries * self.num_steps

    @override
    def workspace(self, entries: int, sequence_bytes: int) -> int:
        return 20 * entries + 2 * self.batch_size * sequence_bytes

    @override
    def compress(self, block: BlockWeights, passage: Passage) -> dict[str, Weight]:
        start = dict(block.weights)
        start.update({name: self.begin(start[name]) for name, slot in block.slots.items() if not slot.protected})
        latents = {
            name: _Latent.of(weight, block.original[name].unpack(torch.float32))
            for name, weight in start.items()
            if _is_refinable(weight)
        }
        if not latents:
            raise ValueError("autoround found no quantized weights; give it bits, or put a quantizing step before it")
        fixed = {name: weight.unpack(passage.dtype) for name, weight in start.items() if name not in latents}
        best = self._learn(latents, fixed, passage)
        return {name: latent.weight(start[name]) for name, latent in best.items()}

    def _rounded(self, w: Float[Tensor, "out in"], mask: Bool[Tensor, "out in"] | None, _: Any) -> Weight:
        assert self.bits is not None
        values = w if mask is None else torch.where(mask, w, 0)
        grid = fit_grid(
            values,
            bits=self.bits,
            group_size=self.group_size,
            symmetric=self.symmetric,
            scale_dtype=stored_scale_dtype(w.dtype),
            search=True,
        )
        return GroupInt.of_packed(quantize_packed(values, grid), (w.shape[0], w.shape[1]), grid, w.dtype)

    def _learn(self, latents: dict[str, "_Latent"], fixed: dict[str, Tensor], passage: Passage) -> dict[str, "_Latent"]:
        """The steps; gives the latents as they were when the whole error was least."""
        best, least = {name: latent.copy() for name, latent in latents.items()}, _error(latents, fixed, passage)
        order = _Order(passage.num_sequences, self.batch_size, self.seed)
        rate = 1.0 / self.num_steps if self.learning_rate is None else self.learning_rate
        look_every = -(-self.num_steps // _LOOKS)
        for step in range(self.num_steps):
            now = rate * (1.0 - step / self.num_steps)
            gradients = _gradients(latents, fixed, passage, order.next())
            for name, latent in latents.items():
                latent.move(gradients[name], now, learn_scale=self.learn_scale)
            if (step + 1) % look_every == 0 or step + 1 == self.num_steps:
                error = _error(latents, fixed, passage)
                if error < least:
                    best, least = {name: latent.copy() for name, latent in latents.items()}, error
        return best


@dataclass(slots=True)
class _Latent:
    """One matrix on its way: where each weight lies between codes, and each group's scale.

    Attributes:
        weight_over_scale: the original weight in units of the first scale.
        shift: what is added before rounding.
        start: the shift that gives the codes it started with; it may move half a code from there.
        first: the scales that it started with.
        factor: what they are multiplied by.
        zero: zero points.
        mask: True where a weight survives; the others stay zero.
        grid: bits, group size, stored zero points.
    """

    weight_over_scale: Float[Tensor, "out groups size"]
    shift: Float[Tensor, "out groups size"]
    start: Float[Tensor, "out groups size"]
    first: Float[Tensor, "out groups 1"]
    factor: Float[Tensor, "out groups 1"]
    zero: Float[Tensor, "out groups 1"] | float
    mask: Bool[Tensor, "out groups size"] | None
    grid: Grid

    @classmethod
    def of(cls, weight: Weight, original: Float[Tensor, "out in"]) -> Self:
        """Start where a weight's codes are, as near to the original as those codes allow."""
        inner = weight.inner if isinstance(weight, Masked) else weight
        assert isinstance(inner, GroupInt)
        grid = inner.grid()
        rows, cols = inner.shape
        shape = (rows, cols // grid.group_size, grid.group_size)
        scale = grid.scale.float().expand(rows, shape[1]).unsqueeze(-1)
        zero = 2.0 ** (grid.bits - 1) if grid.zero is None else grid.zero.float().expand(rows, shape[1]).unsqueeze(-1)
        ratio = original.reshape(shape) / scale
        codes = inner.unpack_codes().float().reshape(shape) - zero
        nearest = torch.minimum(torch.maximum(ratio, codes - 0.49), codes + 0.49)
        mask = weight.survivors().reshape(shape) if isinstance(weight, Masked) else None
        shift = nearest - ratio
        return cls(ratio, shift, shift.clone(), scale.clone(), torch.ones_like(scale), zero, mask, grid)

    def copy(self) -> Self:
        """What changes, copied."""
        return replace(self, shift=self.shift.clone(), factor=self.factor.clone())

    def matrix(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        """The weights at these codes and scales."""
        rows, groups, size = self.shift.shape
        out = torch.empty(rows, groups * size, dtype=dtype)

        def work(part: slice) -> None:
            values = self._codes(part).mul_(self._scale(part))
            out[part] = values.reshape(-1, groups * size)

        each_piece(work, rows, groups * size)
        return out

    def move(self, gradient: Float[Tensor, "out in"], rate: float, *, learn_scale: bool) -> None:
        """A signed step against the gradient of the loss by the matrix."""
        rows, groups, size = self.shift.shape

        def work(part: slice) -> None:
            g = gradient[part].float().reshape(-1, groups, size)
            if self.mask is not None:
                g = g * self.mask[part]
            if learn_scale and self._own_scales:
                # d(code·scale)/d(scale) with straight-through rounding: the code, less the position where not clipped
                position = self._position(part)
                code = self._rounded(part, position)
                inside = (code - position).abs_() <= _HALF + 1e-3
                slope = (g * (code - position * inside)).sum(-1, keepdim=True)
                self.factor[part] = (self.factor[part] - rate * slope.sign_()).clamp_(*_SCALE_RANGE)
            start = self.start[part]
            moved = self.shift[part] - rate * g.sign()
            self.shift[part] = torch.minimum(torch.maximum(moved, start - _HALF), start + _HALF)

        each_piece(work, rows, groups * size)

    def weight(self, before: Weight) -> Weight:
        """Packed, in the structure that it had."""
        rows, groups, size = self.shift.shape
        everything = slice(0, rows)
        codes = (self._codes(everything) + self.zero).round_().clamp_(0, self._top).to(torch.uint8)
        codes = codes.reshape(rows, groups * size)
        if isinstance(before, Masked):
            return Masked.of(self._group_int(codes, before.dtype), before.survivors())
        return self._group_int(codes, before.dtype)

    def _group_int(self, codes: Tensor, dtype: torch.dtype) -> GroupInt:
        if not self._own_scales:
            return GroupInt.of(codes, self.grid, dtype)
        scale = self._scale(slice(0, codes.shape[0])).squeeze(-1).to(self.grid.scale.dtype)
        return GroupInt.of(codes, replace(self.grid, scale=scale), dtype)

    @property
    def _top(self) -> int:
        """The largest code."""
        return (1 << self.grid.bits) - 1

    @property
    def _own_scales(self) -> bool:
        """Whether each row has scales of its own, and not the whole matrix one."""
        return self.grid.scale.shape[0] == self.shift.shape[0]

    def _scale(self, part: slice) -> Tensor:
        """Rounded to what will be stored."""
        return (self.first[part] * self.factor[part]).to(self.grid.scale.dtype).float()

    def _position(self, part: slice) -> Tensor:
        return self.weight_over_scale[part] / self.factor[part] + self.shift[part]

    def _codes(self, part: slice) -> Tensor:
        """Codes counted from zero."""
        return self._rounded(part, self._position(part))

    def _rounded(self, part: slice, position: Tensor) -> Tensor:
        zero = self.zero if isinstance(self.zero, float) else self.zero[part]
        codes = (position + zero).round_().clamp_(0, self._top).sub_(zero)
        return codes if self.mask is None else codes.mul_(self.mask[part])


class _Order:
    """Batches of sequence numbers, every sequence once before any a second time."""

    def __init__(self, count: int, batch: int, seed: int) -> None:
        self._count, self._batch = count, min(batch, count)
        self._generator = torch.Generator().manual_seed(seed)
        self._left: list[int] = []

    def next(self) -> list[int]:
        """The next batch."""
        if len(self._left) < self._batch:
            self._left = torch.randperm(self._count, generator=self._generator).tolist()
        batch, self._left = self._left[: self._batch], self._left[self._batch :]
        return batch


def _gradients(
    latents: dict[str, _Latent], fixed: dict[str, Tensor], passage: Passage, batch: list[int]
) -> dict[str, Tensor]:
    """Gradient of a batch's error by each matrix."""
    leaves = {name: latent.matrix(passage.dtype).requires_grad_() for name, latent in latents.items()}
    x, target = _batch(passage, batch)
    with torch.enable_grad():
        loss = _loss(passage.run({**fixed, **leaves}, x), target)
    found = torch.autograd.grad(loss, list(leaves.values()))
    return dict(zip(leaves, found, strict=True))


@torch.no_grad()
def _error(latents: dict[str, _Latent], fixed: dict[str, Tensor], passage: Passage) -> float:
    """The mean error over sequences spread through the calibration data."""
    matrices = {**fixed, **{name: latent.matrix(passage.dtype) for name, latent in latents.items()}}
    looked = range(0, passage.num_sequences, -(-passage.num_sequences // _LOOKED_AT))
    losses = []
    for first in range(0, len(looked), _AT_ONCE):
        x, target = _batch(passage, looked[first : first + _AT_ONCE])
        losses.append(float(_loss(passage.run(matrices, x), target)) * x.shape[0])
    total = sum(losses) / len(looked)
    if not total < float("inf"):
        raise ValueError("the block's outputs hold NaN or infinite values; the checkpoint or the text is damaged")
    return total


def _batch(passage: Passage, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Inputs and targets of some sequences."""
    x = torch.cat([passage.inputs(i, i + 1) for i in numbers])
    return x, torch.cat([passage.targets(i, i + 1) for i in numbers])


def _loss(out: Tensor, target: Tensor) -> Tensor:
    """Squared error of each token relative to its hidden state's size: what the next norm will see."""
    wanted = target.float()
    return ((out.float() - wanted).square().sum(-1) / wanted.square().sum(-1).clamp(min=1e-12)).mean()


def _is_refinable(weight: Weight) -> bool:
    inner = weight.inner if isinstance(weight, Masked) else weight
    return isinstance(inner, GroupInt)


def _is_dense(weight: Weight) -> bool:
    return not any(isinstance(node, GroupInt | FloatBlock) for node in weight.walk())

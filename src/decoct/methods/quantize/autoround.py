"""AutoRound / SignRound (arXiv 2309.05516, 2512.04746): learn which way to round, by signed gradient steps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from typing_extensions import override

from decoct.methods.base import BlockMethod, BlockWeights, Passage, quantize_structure
from decoct.ops.grid import check_grid, fit_grid, quantize_packed, resolve_group_size, stored_scale_dtype
from decoct.ops.hadamard import hadamard
from decoct.ops.parallel import each_piece
from decoct.ops.rounding import clipped_codes, rounding_gradients
from decoct.weights import Dense, GroupInt, LowRank, Masked, Rotated, Shared, Sparse, Stacked, Sum, Weight, pull_back

_HALF = 0.5  # a weight may move to the neighbouring code, not beyond
_NEAREST = 0.4  # codes that a weight lies from the code it starts with, at most: nearer to the edge, noise moves it
_PATH = 0.75  # codes that a weight can move in all, by default
_SCALE_RATE = 0.25  # a scale's relative step, in steps of a weight
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
        learning_rate: first step size, in codes; None is 0.75 / num_steps. It decays to zero.
        learn_scale: whether scales are learned too.
        seed: of the order in which sequences are seen.
    """

    bits: int | None = None
    group_size: int | str = 64
    symmetric: bool = True
    num_steps: int = 96
    batch_size: int = 2
    learning_rate: float | None = None
    learn_scale: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.bits is not None:
            check_grid(self.bits, self.group_size)
        if self.num_steps < 1 or self.batch_size < 1:
            raise ValueError("num_steps and batch_size must be at least 1")
        if self.learning_rate is not None and not 0 < self.learning_rate <= 1:
            raise ValueError(f"learning_rate must be above 0 and at most 1 code a step, not {self.learning_rate}")

    @override
    def obstacle(self, weight: Weight, original: Weight) -> str | None:
        if isinstance(original, Shared):
            return f"autoround cannot improve a weight that is shared with {original.target}; improve that one"
        if weight.quantizes_inputs:
            return "autoround learns codes for inputs as they are; put the step that rounds inputs after it"
        if not _is_real(original):
            return (
                "autoround compares with what its stage began with, and that was compressed already; put autoround "
                "into the same blocks list as the step that quantizes, and start from the uncompressed model"
            )
        if self.rounds(weight) or _grids(weight):
            return None
        if _is_real(weight):
            return "autoround finds nothing quantized; give it bits, or put a step that quantizes, such as gptq, before"
        return (
            f"autoround learns codes of grids with integer zero points, which this {weight.kind} has not; leave it out"
        )

    @override
    def rounds(self, weight: Weight) -> bool:
        return self.bits is not None and _is_real(weight)

    @override
    def begin(self, weight: Weight) -> Weight:
        return quantize_structure(weight, None, self._rounded, "autoround") if self.rounds(weight) else weight

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
        return 32 * entries + 2 * self.batch_size * sequence_bytes

    @override
    def compress(self, block: BlockWeights, passage: Passage) -> dict[str, Weight]:
        works = [
            name
            for name, slot in block.slots.items()
            if not slot.protected and self.obstacle(block.weights[name], block.original[name]) is None
        ]
        if not works:
            return {}
        learned = {
            name: _Learned.of(self.begin(block.weights[name]), block.weights[name], block.original[name])
            for name in works
        }
        fixed = {name: weight.unpack(passage.dtype) for name, weight in block.weights.items() if name not in learned}
        return {name: best.weight() for name, best in self._learn(learned, fixed, passage).items()}

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

    def _learn(
        self, learned: dict[str, "_Learned"], fixed: dict[str, Tensor], passage: Passage
    ) -> dict[str, "_Learned"]:
        """The steps; gives the matrices as they were when the whole error was least."""
        best, least = {name: each.copy() for name, each in learned.items()}, _error(learned, fixed, passage)
        order = _Order(passage.num_sequences, self.batch_size, self.seed)
        rate = _PATH / self.num_steps if self.learning_rate is None else self.learning_rate
        look_every = -(-self.num_steps // _LOOKS)
        for step in range(self.num_steps):
            now = rate * (1.0 - step / self.num_steps)
            gradients = _gradients(learned, fixed, passage, order.next())
            for name, each in learned.items():
                each.move(gradients[name], now, learn_scale=self.learn_scale)
            if (step + 1) % look_every == 0 or step + 1 == self.num_steps:
                error = _error(learned, fixed, passage)
                if error < least:
                    best, least = {name: each.copy() for name, each in learned.items()}, error
        return best


@dataclass(frozen=True, slots=True)
class _Learned:
    """One slot on its way: what it is made of, and the integer codes in it that are learned.

    Attributes:
        start: the weight as learning found it.
        latents: by where they stand in it, as `_grids` names it.
    """

    start: Weight
    latents: dict[str, "_Latent"]

    @classmethod
    def of(cls, start: Weight, before: Weight, original: Weight) -> Self:
        """Begin to learn `start`, which was `before` until it was rounded, and `original` when the stage began."""
        goals = _goals(start, before, original.unpack(torch.float32))
        return cls(start, {path: _Latent.of(grid, goals[path]) for path, grid in _grids(start).items()})

    def copy(self) -> Self:
        """What changes, copied."""
        return replace(self, latents={path: latent.copy() for path, latent in self.latents.items()})

    def unpack(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        """The matrix as it would be stored now."""
        return self._values().unpack(dtype)

    def move(self, gradient: Float[Tensor, "out in"], rate: float, *, learn_scale: bool) -> None:
        """A step against the gradient of the loss by the matrix."""
        pulled = pull_back(self._values(), gradient)
        for path, latent in self.latents.items():
            latent.move(pulled[f"{path}values"], rate, learn_scale=learn_scale)

    def weight(self) -> Weight:
        """Packed, in the structure that it had."""
        return _with(self.start, {path: latent.weight() for path, latent in self.latents.items()})

    def _values(self) -> Weight:
        """The same with the learned parts unpacked."""
        return _with(self.start, {path: Dense.of(latent.values()) for path, latent in self.latents.items()})


@dataclass(slots=True)
class _Latent:
    """Integer codes on their way: where each weight lies between codes, and each group's scale.

    The scale is learned apart from the codes: a position stays where it is when its scale changes.

    Attributes:
        before: the codes and scales that it started with.
        position: where each weight lies, in codes counted from zero.
        start: where it lay; it may move half a code from there.
        first: the scales that it started with.
        factor: what they are multiplied by.
        zero: zero points.
    """

    before: GroupInt
    position: Float[Tensor, "out groups size"]
    start: Float[Tensor, "out groups size"]
    first: Float[Tensor, "out groups 1"]
    factor: Float[Tensor, "out groups 1"]
    zero: Float[Tensor, "out groups 1"]

    @classmethod
    def of(cls, weight: GroupInt, wanted: Float[Tensor, "out in"]) -> Self:
        """Start where the codes are, as near to what is wanted as those codes allow."""
        grid = weight.grid()
        rows, cols = weight.shape
        groups = cols // grid.group_size
        scale = grid.scale.float().expand(rows, groups).unsqueeze(-1)
        middle = torch.full_like(grid.scale, 2.0 ** (grid.bits - 1)) if grid.zero is None else grid.zero
        zero = middle.float().expand(rows, groups).unsqueeze(-1)
        codes = weight.unpack_codes().reshape(rows, groups, -1) - zero
        start = (wanted.reshape(codes.shape) / scale).clamp_(codes - _NEAREST, codes + _NEAREST)
        return cls(weight, start.clone(), start, scale.clone(), torch.ones_like(scale), zero)

    def copy(self) -> Self:
        """What changes, copied."""
        return replace(self, position=self.position.clone(), factor=self.factor.clone())

    def values(self) -> Float[Tensor, "out in"]:
        """The weights at these codes and scales, float32."""
        out = torch.empty_like(self.position)

        def work(part: slice) -> None:
            torch.mul(self._codes(part), self._scale(part), out=out[part])

        each_piece(work, *self.before.shape)
        return out.reshape(self.before.shape)

    def move(self, gradient: Float[Tensor, "out in"], rate: float, *, learn_scale: bool) -> None:
        """A signed step against the gradient of the loss by the values."""
        g = gradient.reshape(self.position.shape)
        own_scales = self.before.scale.shape[0] == self.before.shape[0]  # each row has some; the matrix not one in all

        def work(part: slice) -> None:
            position, start = self.position[part], self.start[part]
            by_position, by_scale = rounding_gradients(g[part], position, self._scale(part), *self._limits(part))
            if learn_scale and own_scales:
                moved = self.factor[part] - _SCALE_RATE * rate * by_scale.sign()
                self.factor[part] = moved.clamp_(*_SCALE_RANGE)
            self.position[part] = (position - rate * by_position.sign()).clamp_(start - _HALF, start + _HALF)

        each_piece(work, *self.before.shape)

    def weight(self) -> GroupInt:
        """Packed; zero points as they were."""
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


class _Order:
    """Batches of sequence numbers: pass after pass over all of them, each in an order of its own."""

    def __init__(self, count: int, batch: int, seed: int) -> None:
        self._count, self._batch = count, min(batch, count)
        self._generator = torch.Generator().manual_seed(seed)
        self._left: list[int] = []

    def next(self) -> list[int]:
        """The next batch; what is left of one pass is filled up from the next."""
        while len(self._left) < self._batch:
            self._left += torch.randperm(self._count, generator=self._generator).tolist()
        batch, self._left = self._left[: self._batch], self._left[self._batch :]
        return batch


def _gradients(
    learned: dict[str, _Learned], fixed: dict[str, Tensor], passage: Passage, batch: list[int]
) -> dict[str, Tensor]:
    """Gradient of a batch's error by each matrix."""
    leaves = {name: each.unpack(passage.dtype).requires_grad_() for name, each in learned.items()}
    x, target = _batch(passage, batch)
    with torch.enable_grad():
        loss = _loss(passage.run({**fixed, **leaves}, x), target)
    # An expert that no token of the batch reached has no part in the loss.
    found = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    return dict(zip(leaves, found, strict=True))


@torch.no_grad()
def _error(learned: dict[str, _Learned], fixed: dict[str, Tensor], passage: Passage) -> float:
    """The mean error over sequences spread through the calibration data."""
    matrices = {**fixed, **{name: each.unpack(passage.dtype) for name, each in learned.items()}}
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


def _is_real(weight: Weight) -> bool:
    """Whether every stored value is a real number: nothing in it is quantized."""
    return all(isinstance(node, Dense | Sparse) for node in weight.walk() if not node.children())


def _grids(weight: Weight, path: str = "") -> dict[str, GroupInt]:
    """Every GroupInt with integer zero points in a weight, by where it stands: "", "inner.", "terms.0." and so on."""
    if isinstance(weight, GroupInt):
        real = weight.zero is not None and weight.zero.is_floating_point()
        return {} if real else {path: weight}
    found: dict[str, GroupInt] = {}
    for name, child in weight.children().items():
        found.update(_grids(child, f"{path}{name}."))
    return found


def _with(weight: Weight, parts: Mapping[str, Weight], path: str = "") -> Weight:
    """A weight with other parts where `_grids` found some."""
    if path in parts:
        return parts[path]
    children = {name: _with(child, parts, f"{path}{name}.") for name, child in weight.children().items()}
    return weight.with_children(children) if children else weight


def _goals(
    weight: Weight, before: Weight, wanted: Float[Tensor, "out in"], path: str = ""
) -> dict[str, Float[Tensor, "out in"]]:
    """What each of a weight's grids should hold so that the whole comes closest to `wanted`, by the names of `_grids`.

    A factor of a product has no such goal by itself: it should stay what it was before it was rounded, where that is
    known.
    """
    match weight:
        case GroupInt():
            return {path: wanted}
        case Masked(inner=inner):
            below = before.inner if isinstance(before, Masked) else before
            return _goals(inner, below, wanted * weight.survivors(), f"{path}inner.")
        case Rotated(inner=inner, left=None, right=right) if right is not None:
            below = before.inner if isinstance(before, Rotated) else before
            return _goals(inner, below, hadamard(wanted / right.float()), f"{path}inner.")
        case Sum(terms=terms):
            values = [term.unpack(torch.float32) for term in terms]
            found: dict[str, Tensor] = {}
            for number, term in enumerate(terms):
                others = sum(values[:number] + values[number + 1 :], torch.zeros(()))
                found.update(_goals(term, term, wanted - others, f"{path}terms.{number}."))
            return found
        case Stacked(parts=parts):
            pairs = enumerate(zip(parts, weight.split(wanted), strict=True))
            goals = (_goals(part, part, rows, f"{path}parts.{n}.") for n, (part, rows) in pairs)
            return {name: goal for each in goals for name, goal in each.items()}
        case LowRank(left=left, right=right):
            known = before if isinstance(before, LowRank) else weight
            return {
                **_goals(left, known.left, known.left.unpack(torch.float32), f"{path}left."),
                **_goals(right, known.right, known.right.unpack(torch.float32), f"{path}right."),
            }
    return {}

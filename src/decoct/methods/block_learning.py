"""Learning a block's integer codes from its outputs: the part that does not depend on what exactly is learned.

Methods on blocks that round weights differ in the numbers they learn and in how codes follow from those. They share the
rest: which weights they can work on, the calibration batches, a token's error relative to the size of its hidden state,
and that the best of what was seen on the way is kept, the start included.
"""

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from typing_extensions import override

from decoct.methods.base import BlockMethod, BlockWeights, Passage, quantize_structure
from decoct.methods.learned_grid import Latent, Learned, goals, grids
from decoct.ops.grid import check_grid, fit_grid, quantize_packed, resolve_group_size, stored_scale_dtype
from decoct.weights import Dense, GroupInt, Shared, Sparse, Weight

_LOOKS = (0.5, 0.75, 1.0)  # shares of the steps after which the error is measured, to keep the best
_LOOKED_AT = 24  # sequences that it is measured on
_AT_ONCE = 4  # of them
_NEEDED = 24  # bytes an entry that learning takes beside what is learned: matrices, gradients, one matrix's temporaries


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockLearning(BlockMethod):
    """Learns codes of a block's integer weights so that the block's output changes least.

    Attributes:
        key: the method's name in recipes, for messages.
        path: `learning_rate` times `num_steps`, by default.
        state_bytes: bytes that it keeps for each weight while it learns.
        step_operations: for each weight in each step, beside running the block.
        bits: 2 to 8, for slots that no earlier step quantized; None leaves those alone.
        group_size: input features that share a scale, or "channel", for the same.
        symmetric: no zero points, for the same.
        num_steps: gradient steps.
        batch_size: sequences in each.
        learning_rate: of the first step; None: as far as `num_steps` need it. It decays to zero.
        seed: of the order in which sequences are seen.
    """

    key: ClassVar[str]
    path: ClassVar[float]
    state_bytes: ClassVar[int]
    step_operations: ClassVar[float]

    bits: int | None = None
    group_size: int | str = 64
    symmetric: bool = True
    num_steps: int = 96
    batch_size: int = 2
    learning_rate: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.bits is not None:
            check_grid(self.bits, self.group_size)
        if self.num_steps < 1 or self.batch_size < 1:
            raise ValueError("num_steps and batch_size must be at least 1")
        if self.learning_rate is not None and not 0 < self.learning_rate <= 1:
            raise ValueError(f"learning_rate must be above 0 and at most 1, not {self.learning_rate}")

    @abstractmethod
    def latent(self, weight: GroupInt, wanted: Float[Tensor, "out in"]) -> Latent:
        """Begin to learn a grid, which should come close to what is wanted."""

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        first = self.path / self.num_steps if self.learning_rate is None else self.learning_rate
        return first * (1.0 - step / self.num_steps)

    @override
    def obstacle(self, weight: Weight, original: Weight) -> str | None:
        if isinstance(original, Shared):
            return f"{self.key} cannot improve a weight that is shared with {original.target}; improve that one"
        if weight.quantizes_inputs:
            return f"{self.key} learns codes for inputs as they are; put the step that rounds inputs after it"
        if not _is_real(original):
            return (
                f"{self.key} compares with what its stage began with, and that was compressed already; put {self.key} "
                "into the same blocks list as the step that quantizes, and start from the uncompressed model"
            )
        if self.rounds(weight) or grids(weight):
            return None
        if _is_real(weight):
            return (
                f"{self.key} finds nothing quantized; give it bits, or put a step that quantizes, such as gptq, before"
            )
        return (
            f"{self.key} learns codes of grids with integer zero points, which this {weight.kind} has not; leave it out"
        )

    @override
    def rounds(self, weight: Weight) -> bool:
        return self.bits is not None and _is_real(weight)

    @override
    def begin(self, weight: Weight) -> Weight:
        return quantize_structure(weight, None, self._rounded, self.key) if self.rounds(weight) else weight

    @override
    def check(self, shape: tuple[int, int]) -> None:
        if self.bits is not None:
            resolve_group_size(self.group_size, shape[1])

    @override
    def operations(self, entries: int, num_sequences: int, length: int) -> float:
        forward = 2.0 * entries * length
        learned = 3 * self.num_steps * min(self.batch_size, num_sequences)
        looks = (len(_LOOKS) + 1) * min(_LOOKED_AT, num_sequences)
        return forward * (learned + looks) + self.step_operations * entries * self.num_steps

    @override
    def workspace(self, entries: int, sequence_bytes: int) -> int:
        return (_NEEDED + self.state_bytes) * entries + 2 * self.batch_size * sequence_bytes

    @override
    def compress(self, block: BlockWeights, passage: Passage) -> dict[str, Weight]:
        works = [
            name
            for name, slot in block.slots.items()
            if not slot.protected and self.obstacle(block.weights[name], block.original[name]) is None
        ]
        if not works:
            return {}
        learned = {name: self._begun(block.weights[name], block.original[name]) for name in works}
        fixed = {name: weight.unpack(passage.dtype) for name, weight in block.weights.items() if name not in learned}
        return self._learn(learned, fixed, passage)

    def _begun(self, before: Weight, original: Weight) -> Learned:
        """Begin to learn what is `before` now, and was `original` when the stage began."""
        start = self.begin(before)
        wanted = goals(start, before, original.unpack(torch.float32))
        return Learned(start, {path: self.latent(grid, wanted[path]) for path, grid in grids(start).items()})

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

    def _learn(self, learned: dict[str, Learned], fixed: dict[str, Tensor], passage: Passage) -> dict[str, Weight]:
        """The steps; gives the weights as they were when the whole error was least."""
        best = {name: each.start for name, each in learned.items()}
        least = _error(best, fixed, passage)
        order = Order(passage.num_sequences, self.batch_size, self.seed)
        looks = {math.ceil(share * self.num_steps) for share in _LOOKS}
        for step in range(self.num_steps):
            gradients = _gradients(learned, fixed, passage, order.next())
            for name, each in learned.items():
                each.move(gradients.pop(name), self.rate(step))
            if step + 1 in looks:
                found = {name: each.weight() for name, each in learned.items()}
                error = _error(found, fixed, passage)
                if error < least:
                    best, least = found, error
        return best


class Order:
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
    learned: dict[str, Learned], fixed: dict[str, Tensor], passage: Passage, batch: list[int]
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
def _error(weights: Mapping[str, Weight], fixed: dict[str, Tensor], passage: Passage) -> float:
    """The mean error over sequences spread through the calibration data."""
    matrices = {**fixed, **{name: each.unpack(passage.dtype) for name, each in weights.items()}}
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

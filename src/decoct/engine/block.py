"""One block in memory, and the lifts that turn methods on matrices into steps on blocks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from decoct.arch import Slot
from decoct.engine.passage import BlockPassage
from decoct.engine.rules import Method, statistic
from decoct.methods import BlockMethod, BlockWeights, LinearMethod
from decoct.methods.experts import ExpertStat
from decoct.weights import Weight

Stats = Mapping[str, Mapping[type[Any], Any]]
"""Statistics by edge and kind."""


@dataclass(frozen=True, slots=True)
class Block:
    """What a step sees.

    Attributes:
        label: "block 3", "embedding" or "lm_head", for messages.
        slots: by full name.
        original: each slot's weight as it was when the block was loaded, rescaled as `weights` are.
        weights: each slot's weight as earlier steps left it.
        stats: statistics of the inputs, by edge, then by kind.
        starved: slots that no calibration token reached; their statistics are neutral ones.
        passage: calibration through the block, for steps that run it; None outside the blocks, or if none does.
        vectors: norms, biases and the like, by full name.
        prefix: of the full names of a block's tensors; None outside the blocks.
        answers: what was noted of its experts' answers; None: nothing.
        rerun: gives statistics of the block as it is by now, for a step that looks twice; None: no step does.
    """

    label: str
    slots: dict[str, Slot]
    original: Mapping[str, Weight]
    weights: Mapping[str, Weight]
    stats: Stats = field(default_factory=dict)
    starved: tuple[str, ...] = ()
    passage: BlockPassage | None = None
    vectors: Mapping[str, Tensor] = field(default_factory=dict)
    prefix: str | None = None
    answers: ExpertStat | None = None
    rerun: Callable[["Block"], Stats] | None = None

    def with_weights(self, new: Mapping[str, Weight]) -> "Block":
        """The block with other weights in some slots."""
        return replace(self, weights={**self.weights, **new})


Step = Callable[[Block], Block]
"""Takes a block and gives what it becomes."""


def each_linear(methods: Mapping[str, Method]) -> Step:
    """Lift methods on single matrices to a block.

    Args:
        methods: by full slot name; slots of the block that are absent stay as they are.
    """

    def step(block: Block) -> Block:
        found: dict[str, Weight] = {}
        for name, slot in block.slots.items():
            method = methods.get(name)
            if method is not None:
                kind = statistic(method, slot)
                stat = None if kind is None else block.stats[slot.reads][kind]
                found[name] = apply_method(method, block.weights[name], stat, block.original[name], name)
        return block.with_weights(found)

    return step


def each_block(method: BlockMethod) -> Step:
    """Lift a method on whole blocks; what lies outside the blocks stays as it is."""

    def step(block: Block) -> Block:
        if block.passage is None:
            return block
        try:
            passage = block.passage.with_weights(block.weights)
            new = method.compress(BlockWeights(block.slots, block.original, block.weights), passage)
        except ValueError as error:
            raise ValueError(f"{block.label}: {error}") from error
        return block.with_weights(new)

    return step


def chain(*steps: Step) -> Step:
    """Run steps one after another on the same block, each seeing what the ones before it made."""

    def step(block: Block) -> Block:
        for each in steps:
            block = each(block)
        return block

    return step


def apply_method(method: Method, weight: Weight, stat: Any, original: Weight, name: str) -> Weight:
    """Run one method on one weight; errors carry the slot's name.

    Raises:
        ValueError: whatever the method refuses.
    """
    try:
        if isinstance(method, LinearMethod):
            return method.compress(weight, stat)
        return method.correct(weight, stat, original)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error

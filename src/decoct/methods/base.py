"""What a method is, and how methods that work on one dense matrix meet weights that are already compressed."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from decoct.arch import Slot
from decoct.ops.hadamard import random_signs
from decoct.ops.rotation import Turn
from decoct.stats import PairedGram, Stat
from decoct.weights import Dense, LowRank, Masked, Padded, QuantizedInput, Rotated, Shared, Sparse, Weight


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearMethod(ABC):
    """Compresses one matrix at a time. Subclasses are frozen dataclasses; their fields are the recipe's keys.

    Attributes:
        quantizes_inputs: whether what it makes rounds its inputs, so that the matrix alone does not tell what it does.
    """

    quantizes_inputs: ClassVar[bool] = False

    @property
    def stat(self) -> Any:
        """The kind of statistic of the layer's inputs that it needs (a class as in `stats`), or None: it needs no data.

        A class variable in most subclasses; a property where the settings decide.
        """
        return None

    @abstractmethod
    def compress(self, weight: Weight, stat: Any) -> Weight:
        """The compressed weight; keeps the structure that `weight` already has, or refuses.

        Args:
            weight: what earlier steps made of the slot; not changed.
            stat: an instance of `self.stat`, or None.

        Raises:
            ValueError: the method cannot keep this weight's structure, or the numbers are not finite.
        """

    def check(self, shape: tuple[int, int]) -> None:  # noqa: B027 - most methods fit any shape
        """Raise ValueError, with the remedy, if a matrix of this shape cannot be compressed. Called while planning."""

    def leaves(self, shape: tuple[int, int]) -> tuple[tuple[int, int], ...]:
        """Shapes of the matrices that a later step will find in place of one of `shape`."""
        return (shape,)

    def workspace(self, shape: tuple[int, int]) -> int:
        """Bytes that compressing a matrix takes at its peak, beside the matrix itself; the planner counts with it."""
        return 12 * shape[0] * shape[1]

    def operations(self, shape: tuple[int, int]) -> float:
        """Floating-point operations of compressing a matrix, roughly; for the planner's estimate of time."""
        return 100.0 * shape[0] * shape[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearCorrection(ABC):
    """Adds to a compressed matrix some of what it lost, given what it was before the recipe's first step.

    Attributes:
        stat: as for LinearMethod.
        quantizes_inputs: as for LinearMethod.
    """

    stat: ClassVar[type[Any] | None] = None
    quantizes_inputs: ClassVar[bool] = False

    @abstractmethod
    def correct(self, weight: Weight, stat: Any, original: Weight) -> Weight:
        """The corrected weight.

        Raises:
            ValueError: the numbers are not finite.
        """

    def check(self, shape: tuple[int, int]) -> None:  # noqa: B027 - as for LinearMethod
        """Raise ValueError, with the remedy, if a matrix of this shape cannot be corrected. Called while planning."""

    def leaves(self, shape: tuple[int, int]) -> tuple[tuple[int, int], ...]:
        """As for LinearMethod."""
        return (shape,)

    def workspace(self, shape: tuple[int, int]) -> int:
        """As for LinearMethod."""
        return 12 * shape[0] * shape[1]

    def operations(self, shape: tuple[int, int]) -> float:
        """As for LinearMethod."""
        return 100.0 * shape[0] * shape[1]


class Passage(Protocol):
    """Calibration on its way through one block: what a block method may read and run."""

    @property
    def num_sequences(self) -> int:
        """Calibration sequences."""

    @property
    def dtype(self) -> torch.dtype:
        """What the block runs in."""

    def inputs(self, start: int, stop: int) -> Float[Tensor, "batch seq hidden"]:
        """What the model as compressed so far feeds into the block, for sequences [start, stop)."""

    def targets(self, start: int, stop: int) -> Float[Tensor, "batch seq hidden"]:
        """What the block puts out in the model as it was before this stage."""

    def run(
        self, matrices: Mapping[str, Float[Tensor, "out in"]], x: Float[Tensor, "batch seq hidden"]
    ) -> Float[Tensor, "batch seq hidden"]:
        """The block's output with a matrix, in `dtype`, for each of its slots; differentiable in them."""


@dataclass(frozen=True, slots=True)
class BlockWeights:
    """The matrices of one block, by full slot name.

    Attributes:
        slots: the architecture's table.
        original: as they were when the stage began.
        weights: as earlier steps left them.
    """

    slots: Mapping[str, Slot]
    original: Mapping[str, Weight]
    weights: Mapping[str, Weight]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockMethod(ABC):
    """Works on a whole block, which it can run: a step of its own in a recipe, beside `linear`."""

    stat: ClassVar[None] = None

    @abstractmethod
    def compress(self, block: BlockWeights, passage: Passage) -> dict[str, Weight]:
        """New weights for some of the slots; none if the block has nothing that it works on.

        Raises:
            ValueError: numbers that are not finite.
        """

    @abstractmethod
    def obstacle(self, weight: Weight, original: Weight) -> str | None:
        """Why it leaves a slot alone, as one line that says what to do instead; None: it works on it.

        Called while planning too, on weights without values: only their structure counts.

        Args:
            weight: what earlier steps made of the slot.
            original: what the slot held when the stage began.
        """

    def rounds(self, weight: Weight) -> bool:  # noqa: ARG002 - most methods work on what earlier steps made
        """Whether it compresses such a weight itself, so that `check` must hold."""
        return False

    @abstractmethod
    def begin(self, weight: Weight) -> Weight:
        """Where the method starts from, without data: a weight of the kind and size that it will make of `weight`.

        Raises:
            ValueError: it cannot work on such a weight.
        """

    def check(self, shape: tuple[int, int]) -> None:  # noqa: B027 - as for LinearMethod
        """As for LinearMethod."""

    def check_learned(self, shape: tuple[int, int]) -> None:  # noqa: B027 - most learn on matrices of any shape
        """While planning: can it learn on a matrix of this shape, whichever step quantized it?

        Raises:
            ValueError: it cannot; says what would fit.
        """

    def leaves(self, shape: tuple[int, int]) -> tuple[tuple[int, int], ...]:
        """As for LinearMethod."""
        return (shape,)

    @abstractmethod
    def operations(self, entries: int, num_sequences: int, length: int) -> float:
        """Floating-point operations for a block of so many matrix entries, roughly; for the planner's estimate.

        Args:
            entries: of all the block's matrices.
            num_sequences: calibration sequences.
            length: tokens in each.
        """

    @abstractmethod
    def workspace(self, entries: int, sequence_bytes: int) -> int:
        """Bytes that it takes at its peak beside the block's own matrices; the planner counts with it.

        Args:
            entries: of all the block's matrices.
            sequence_bytes: of what one sequence leaves behind on its way through the block, for the gradient.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class EdgeScaling(ABC):
    """Rescales the channels of a block's edges, which changes no output, so that later steps lose less.

    A step of its own in a recipe. The engine folds the scales into what writes an edge (a norm's gain, or a matrix
    whose rows can take them) and into what reads it.

    Attributes:
        stat: the statistic of the edge that it needs.
    """

    stat: ClassVar[type[Any]]

    @abstractmethod
    def scale(
        self, readers: Sequence[Float[Tensor, "out in"]], stat: Any, tie: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, "in"]:
        """What the edge's channels shall be divided by, and its readers' columns multiplied with.

        Args:
            readers: the matrices that read the edge, float32; not changed.
            stat: an instance of `self.stat`.
            tie: takes scales [in] to the nearest ones that can be folded (with grouped queries, several channels share
                theirs).

        Raises:
            ValueError: numbers that are not finite.
        """

    def check(self, shape: tuple[int, int]) -> None:  # noqa: B027 - as for LinearMethod
        """As for LinearMethod, for each reader."""

    def workspace(self, shape: tuple[int, int]) -> int:
        """As for LinearMethod, for all readers of an edge stacked."""
        return 16 * shape[0] * shape[1]

    def operations(self, shape: tuple[int, int]) -> float:
        """As for LinearMethod, for all readers of an edge stacked."""
        return 100.0 * shape[0] * shape[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class GainRefit(ABC):
    """Gives a block's norms other gains once the matrices that read them have changed. A step of its own, the last.

    Attributes:
        stat: the statistic of each edge that it needs: the inputs as they are and as they were.
    """

    stat: ClassVar[type[Any]] = PairedGram

    @abstractmethod
    def factors(
        self, readers: Sequence[Float[Tensor, "out in"]], wanted: Sequence[Float[Tensor, "out in"]], stat: Any
    ) -> Float[Tensor, "in"]:
        """What a norm's gain is multiplied with.

        Args:
            readers: the matrices that read it, as they have become, float32; not changed.
            wanted: the same as they were.
            stat: an instance of `self.stat`.

        Raises:
            ValueError: numbers that are not finite.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotation:
    """Turns hidden states by orthogonal matrices, so that no channel is much larger than others; no output changes.

    A step of its own, before all others. The engine folds the rotations into the matrices on either side.

    Attributes:
        residual: turn the residual stream: one rotation for the whole model.
        values: turn each attention head's values: one rotation a block.
        online: turn the inputs of these roles while the model runs, since nothing before them can take a rotation over;
            True: what the MLP's last matrix reads.
        seed: of the random signs.
    """

    residual: bool = True
    values: bool = True
    online: bool | tuple[str, ...] = True
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.residual or self.values or self.online):
            raise ValueError("residual, values and online are all off: nothing would be rotated")

    def first_of_residual(self, width: int, *, keeps_mean: bool) -> Turn:
        """A random rotation of the residual stream: what is used, or where learning starts."""
        return Turn.random(width, 3 * self.seed, keeps_mean=keeps_mean)

    def first_of_values(self, head: int) -> Turn:
        """A random rotation of a head's values."""
        return Turn.random(head, 3 * self.seed + 1)

    def signs(self, width: int) -> Float[Tensor, " width"]:
        """By which inputs that are turned while the model runs are multiplied before their Hadamard transform."""
        return random_signs(width, 3 * self.seed + 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelMethod:
    """Works on the whole model: a stage of its own in a recipe. These are its settings; the engine runs the model."""


DenseRule = Callable[[Float[Tensor, "out in"], Bool[Tensor, "out in"] | None, Any], Weight]


def quantize_structure(weight: Weight, stat: Stat | None, dense: DenseRule, name: str) -> Weight:
    """Apply a quantizer of dense matrices to a weight, keeping zeros zero and low rank low.

    Args:
        weight: Dense; Sparse or Masked over Dense (the mask is kept); Padded (its corner); LowRank of such (each factor
            is quantized, the left one with the statistic of what the right one puts out); Rotated on its input side
            (what it holds is quantized, with the statistic of rotated inputs); QuantizedInput over any of these.
        stat: the statistic of the inputs, or None.
        dense: (float32 matrix, mask of survivors or None, stat) -> Weight.
        name: the method's name, for the message.

    Raises:
        ValueError: the weight is already quantized, shared, or a sum.
    """
    match weight:
        case QuantizedInput(inner=inner):
            return weight.with_children({"inner": quantize_structure(inner, stat, dense, name)})
        case Dense():
            return dense(weight.unpack(), None, stat)
        case Sparse() | Masked(inner=Dense()):
            survivors = weight.survivors()
            return Masked.of(dense(weight.unpack(), survivors, stat), survivors)
        case Padded(inner=inner):
            seen = None if stat is None else stat.through(torch.eye(inner.shape[1], weight.shape[1]))
            return weight.with_children({"inner": quantize_structure(inner, seen, dense, name)})
        case LowRank(left=left, right=right):
            new_right = quantize_structure(right, stat, dense, name)
            seen = None if stat is None else stat.through(new_right.unpack())
            return LowRank.of(quantize_structure(left, seen, dense, name), new_right)
        case Rotated(inner=inner, left=None, right=right) if right is not None:
            seen = None if stat is None else stat.scaled(right.float()).rotated()
            return Rotated.of(quantize_structure(inner, seen, dense, name), None, right)
    raise refusal(name, weight)


def refusal(name: str, weight: Weight) -> ValueError:
    """One sentence on why `name` cannot follow whatever made `weight`."""
    if isinstance(weight, Shared):
        return ValueError(f"{name} cannot compress a weight that is shared with {weight.target}; compress that one")
    if isinstance(weight, Rotated) and weight.left is None:
        return ValueError(f"{name} cannot work on a matrix whose inputs are rotated; leave its role out of `online`")
    if isinstance(weight, Padded):
        return ValueError(
            f"{name} cannot work on what uneven widths leave of a matrix; leave uneven out, or take a quantizer"
        )
    return ValueError(
        f"{name} cannot be applied to a {_nested(weight)} weight without losing its structure; "
        "put it earlier in the recipe"
    )


def _nested(weight: Weight) -> str:
    """The expression that a weight is, such as LowRank(GroupInt, GroupInt)."""
    inner = ", ".join(map(_nested, weight.children().values()))
    return f"{weight.kind}({inner})" if inner else weight.kind

"""What a method is, and how methods that work on one dense matrix meet weights that are already compressed."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Bool, Float
from torch import Tensor

from decoct.stats import Stat
from decoct.weights import Dense, LowRank, Masked, Shared, Sparse, Weight


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearMethod(ABC):
    """Compresses one matrix at a time. Subclasses are frozen dataclasses; their fields are the recipe's keys.

    Attributes:
        stat: the statistic of the layer's inputs that it needs, or None if it needs no data.
    """

    stat: ClassVar[type[Any] | None] = None

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
    """

    stat: ClassVar[type[Any] | None] = None

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


DenseRule = Callable[[Float[Tensor, "out in"], Bool[Tensor, "out in"] | None, Any], Weight]


def quantize_structure(weight: Weight, stat: Stat | None, dense: DenseRule, name: str) -> Weight:
    """Apply a quantizer of dense matrices to a weight, keeping zeros zero and low rank low.

    Args:
        weight: Dense; Sparse or Masked over Dense (the mask is kept); LowRank of such (each factor is quantized, the
            left one with the statistic of what the right one puts out).
        stat: the statistic of the inputs, or None.
        dense: (float32 matrix, mask of survivors or None, stat) -> Weight.
        name: the method's name, for the message.

    Raises:
        ValueError: the weight is already quantized, shared, or a sum.
    """
    match weight:
        case Dense():
            return dense(weight.unpack(), None, stat)
        case Sparse() | Masked(inner=Dense()):
            survivors = weight.survivors()
            return Masked.of(dense(weight.unpack(), survivors, stat), survivors)
        case LowRank(left=left, right=right):
            new_right = quantize_structure(right, stat, dense, name)
            seen = None if stat is None else stat.through(new_right.unpack())
            return LowRank.of(quantize_structure(left, seen, dense, name), new_right)
    raise refusal(name, weight)


def refusal(name: str, weight: Weight) -> ValueError:
    """One sentence on why `name` cannot follow whatever made `weight`."""
    if isinstance(weight, Shared):
        return ValueError(f"{name} cannot compress a weight that is shared with {weight.target}; compress that one")
    kinds = "(".join(node.kind for node in weight.walk())
    return ValueError(
        f"{name} cannot be applied to a {kinds} weight without losing its structure; put it earlier in the recipe"
    )

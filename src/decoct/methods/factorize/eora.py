"""EoRA (arXiv 2410.21271): a low-rank term that makes up for what compression lost, weighted by the layer's inputs."""

from dataclasses import dataclass
from typing import ClassVar

from decoct.methods.base import LinearCorrection
from decoct.ops.low_rank import whitened_low_rank
from decoct.stats import Gram
from decoct.weights import Dense, LowRank, Sum, Weight


@dataclass(frozen=True, slots=True, kw_only=True)
class EoRA(LinearCorrection):
    """Turn a compressed weight into Sum(weight, LowRank): the cheapest recovery at 2 and 3 bits.

    Put it after the step it corrects; the original is what the slot held when the block was loaded.

    Attributes:
        rank: rank of the added term; costs 16·rank·(1/in + 1/out) bits a weight.
    """

    rank: int = 16

    stat: ClassVar[type[Gram]] = Gram

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, not {self.rank}")

    def check(self, shape: tuple[int, int]) -> None:
        """The rank must fit the matrix."""
        if self.rank > min(shape):
            raise ValueError(f"rank {self.rank} is more than a {shape[0]}x{shape[1]} matrix has; at most {min(shape)}")

    def workspace(self, shape: tuple[int, int]) -> int:
        """Float64 copies of the matrix and of the square matrices on either side."""
        return 40 * shape[0] * shape[1] + 40 * shape[1] ** 2 + 24 * min(shape) ** 2

    def operations(self, shape: tuple[int, int]) -> float:
        """Products in float64 and an eigendecomposition of the smaller side."""
        return 8.0 * shape[0] * shape[1] ** 2 + 60.0 * min(shape) ** 3

    def correct(self, weight: Weight, stat: Gram, original: Weight) -> Weight:
        """Add the low-rank term."""
        lost = original.unpack().float() - weight.unpack().float()
        left, right = whitened_low_rank(lost, stat.matrix(), self.rank)
        term = LowRank.of(Dense.of(left.to(weight.dtype)), Dense.of(right.to(weight.dtype)))
        return Sum.of(weight, term)

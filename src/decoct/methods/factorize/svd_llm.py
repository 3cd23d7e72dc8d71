"""SVD-LLM (arXiv 2403.07378): truncate the SVD of W·S, S the Cholesky factor of the inputs' Gram matrix."""

from dataclasses import dataclass
from typing import ClassVar

from decoct.methods.base import LinearMethod, refusal
from decoct.ops.low_rank import whitened_low_rank
from decoct.stats import Gram
from decoct.weights import Dense, LowRank, Weight


def rank_for(shape: tuple[int, int], keep: float, multiple: int = 1) -> int:
    """The largest rank (a multiple of `multiple`) whose two factors hold at most `keep` of the matrix's entries."""
    out, cols = shape
    rank = int(keep * out * cols / (out + cols))
    return max(multiple, rank - rank % multiple)


@dataclass(frozen=True, slots=True, kw_only=True)
class SVDLLM(LinearMethod):
    """Replace each matrix by a product of two thinner ones.

    A square matrix must lose half its rank before it saves a byte, so expect damage below keep 0.8 without training.

    Attributes:
        keep: fraction of the matrix's parameters that the two factors may hold.
        rank_multiple: round the rank down to a multiple of this, e.g. a later quantizer's group size.
    """

    keep: float = 0.8
    rank_multiple: int = 1

    stat: ClassVar[type[Gram]] = Gram

    def __post_init__(self) -> None:
        if not 0 < self.keep < 1:
            raise ValueError(f"keep must lie between 0 and 1, not {self.keep}")
        if self.rank_multiple < 1:
            raise ValueError(f"rank_multiple must be at least 1, not {self.rank_multiple}")

    def check(self, shape: tuple[int, int]) -> None:
        """The rounded rank must still save something."""
        if rank_for(shape, self.keep, self.rank_multiple) * sum(shape) > shape[0] * shape[1]:
            raise ValueError(f"rank_multiple {self.rank_multiple} is too large for a {shape[0]}x{shape[1]} matrix")

    def leaves(self, shape: tuple[int, int]) -> tuple[tuple[int, int], ...]:
        """The two factors."""
        rank = min(rank_for(shape, self.keep, self.rank_multiple), *shape)
        return (shape[0], rank), (rank, shape[1])

    def workspace(self, shape: tuple[int, int]) -> int:
        """Float64 copies of the matrix and of the square matrices on either side."""
        return 32 * shape[0] * shape[1] + 40 * shape[1] ** 2 + 24 * min(shape) ** 2

    def operations(self, shape: tuple[int, int]) -> float:
        """Products in float64 and an eigendecomposition of the smaller side."""
        return 8.0 * shape[0] * shape[1] ** 2 + 60.0 * min(shape) ** 3

    def compress(self, weight: Weight, stat: Gram) -> Weight:
        """Factorize a dense weight; anything else would lose its structure."""
        if not isinstance(weight, Dense):
            raise refusal("svd_llm", weight)
        rank = min(rank_for(weight.shape, self.keep, self.rank_multiple), *weight.shape)
        left, right = whitened_low_rank(weight.unpack(), stat.matrix(), rank)
        return LowRank.of(Dense.of(left.to(weight.dtype)), Dense.of(right.to(weight.dtype)))

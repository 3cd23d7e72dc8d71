"""DSnoT (arXiv 2310.08915): after pruning, swap dropped weights for kept ones, without training."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from decoct.methods.base import LinearCorrection, refusal
from decoct.methods.pruning import finite
from decoct.ops.swapping import run_of, swap
from decoct.stats import Moments
from decoct.weights import Dense, Masked, Sparse, Weight


@dataclass(frozen=True, slots=True, kw_only=True)
class DSnoT(LinearCorrection):
    """Bring back weights whose loss shifts a row's mean output, for others that shift it the other way.

    Put it after the step that prunes, in the same stage; the original is what the slot held when the block was loaded.
    Every row keeps its number of survivors; an N:M pattern that the mask has is found and kept.

    Attributes:
        num_swaps: of each row, at most.
    """

    num_swaps: int = 50

    stat: ClassVar[type[Moments]] = Moments

    def __post_init__(self) -> None:
        if self.num_swaps < 1:
            raise ValueError(f"num_swaps must be at least 1, not {self.num_swaps}")

    def workspace(self, shape: tuple[int, int]) -> int:
        """Some ten matrices in float64."""
        return 96 * shape[0] * shape[1]

    def operations(self, shape: tuple[int, int]) -> float:
        """Some twenty passes over the matrix for each swap."""
        return 60.0 * self.num_swaps * shape[0] * shape[1]

    def correct(self, weight: Weight, stat: Moments, original: Weight) -> Weight:
        """Swap; survivors that an earlier step moved stay where they are."""
        if not isinstance(weight, Sparse) and not (isinstance(weight, Masked) and isinstance(weight.inner, Dense)):
            if weight.kind == Dense.kind:
                raise ValueError(
                    "dsnot swaps what an earlier step pruned; put wanda, sparsegpt or their like before it"
                )
            raise refusal("dsnot", weight)
        variance, mean = stat.variance(), stat.mean
        if not (torch.isfinite(variance).all() and torch.isfinite(mean).all()):
            raise ValueError("the input statistics hold NaN or infinite values; check the model and the text")
        survivors = weight.survivors()
        values, found = swap(
            finite(weight.unpack()).double(),
            finite(original.unpack()).double(),
            survivors,
            mean,
            variance,
            num_swaps=self.num_swaps,
            run=run_of(survivors),
        )
        stored = values.to(weight.dtype)
        return Sparse.of(stored, found) if isinstance(weight, Sparse) else Masked.of(Dense.of(stored), found)

"""SparseGPT (arXiv 2301.00774): prune one input feature after another, letting those not yet pruned make up for it."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from decoct.methods.base import refusal
from decoct.methods.pruning import Pruning, finite
from decoct.ops.block_pruning import BlockPruner
from decoct.ops.blockwise import feed_back_blocks
from decoct.ops.feedback import Elimination, GridRounding
from decoct.ops.grid import Grid, check_grid, fit_grid, resolve_group_size, stored_scale_dtype
from decoct.stats import Gram
from decoct.weights import Dense, GroupInt, Masked, Sparse, Weight


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseGPT(Pruning):
    """Prune with the Gram matrix of the layer's inputs; survivors take up what is lost, and may be rounded on the way.

    In each block of features, what drops is what would cost least when its turn comes, w²/U_jj²; in an N:M pattern, it
    is chosen run by run. See Pruning for the settings that are not named here; with `scope: layer` all rows of a block
    compete, as in the paper.

    Attributes:
        block_size: features for which what drops is chosen at a time; in N:M patterns it changes nothing.
        damping: fraction of the Hessian's mean diagonal added to it; raised if the factorization fails.
        bits: of the survivors, 2 to 8, rounded in the same pass; None: they are not rounded.
        group_size: with `bits`: input features that share a scale, or "channel", or "tensor".
        symmetric: with `bits`: grid around zero, without zero points.
    """

    scope: str = "layer"
    block_size: int = 128
    damping: float = 0.01
    bits: int | None = None
    group_size: int | str = 64
    symmetric: bool = True

    stat: ClassVar[type[Gram]] = Gram

    def __post_init__(self) -> None:
        Pruning.__post_init__(self)
        check_grid(4 if self.bits is None else self.bits, self.group_size)
        if self.block_size < 1:
            raise ValueError(f"block_size must be at least 1, not {self.block_size}")
        if not 0 < self.damping <= 1:
            raise ValueError(f"damping must be above 0 and at most 1, not {self.damping}")

    def check(self, shape: tuple[int, int]) -> None:
        """The pattern must fit, and a group size that is used must divide the input features."""
        Pruning.check(self, shape)
        if self.bits is not None:
            resolve_group_size(self.group_size, shape[1])

    def workspace(self, shape: tuple[int, int]) -> int:
        """Weights, what they become and codes; of a block its features and scores; the Hessian and its factor."""
        return 22 * shape[0] * shape[1] + 40 * shape[0] * min(self.block_size, shape[1]) + 24 * shape[1] ** 2

    def operations(self, shape: tuple[int, int]) -> float:
        """Pushing errors on, the factorization, choosing, and a fixed cost for each feature."""
        out, cols = shape
        passes = 1 if self.bits is None else 2
        return passes * (2.0 * out * cols**2 + 300.0 * out * cols + 2e7 * cols) + 2.0 * cols**3

    def compress(self, weight: Weight, stat: Gram) -> Weight:
        """Prune, and round if `bits` says so; what was pruned stays pruned, and codes stay on the grid they have."""
        match weight:
            case GroupInt() | Masked(inner=GroupInt()):
                return self._on_its_grid(weight, stat)
            case Dense() | Sparse() | Masked(inner=Dense()) if self.bits is not None:
                return self._on_new_grid(weight, self.bits, stat)
        return self.refit(weight, lambda w, kept: self._run(w, kept, self._eliminate(stat)).finish(), "sparsegpt")

    def _on_new_grid(self, weight: Weight, bits: int, stat: Gram) -> Weight:
        """Prune, fit a grid to what the survivors have become, then prune anew and round to it in one pass."""
        self.check(weight.shape)
        w, kept, elimination = finite(weight.unpack()).float(), _kept(weight), self._eliminate(stat)
        values, survivors = self._run(w, kept, elimination).finish()
        grid = fit_grid(
            values * survivors,
            bits=bits,
            group_size=self.group_size,
            symmetric=self.symmetric,
            scale_dtype=stored_scale_dtype(weight.dtype),
            importance=torch.diagonal(stat.matrix()),
            search=True,
        )
        return self._rounded(w, kept, elimination, grid, weight.dtype)

    def _on_its_grid(self, weight: Weight, stat: Gram) -> Weight:
        """Prune what is quantized; survivors move to other codes of the grid that they have."""
        quantized = weight.inner if isinstance(weight, Masked) else weight
        assert isinstance(quantized, GroupInt)
        grid = quantized.grid()
        if self.bits is not None or (grid.zero is not None and grid.zero.is_floating_point()):
            raise refusal("sparsegpt", weight)
        self.check(weight.shape)
        w = finite(weight.unpack()).float()
        return self._rounded(w, _kept(weight), self._eliminate(stat), grid, weight.dtype)

    def _rounded(
        self,
        w: Float[Tensor, "out in"],
        kept: Bool[Tensor, "out in"] | None,
        elimination: Elimination,
        grid: Grid,
        dtype: torch.dtype,
    ) -> Weight:
        rounding = GridRounding(grid, (w.shape[0], w.shape[1]))
        _, survivors = self._run(w, kept, elimination, rounding).finish()
        return Masked.of(GroupInt.of(rounding.finish(), grid, dtype), survivors)

    def _eliminate(self, stat: Gram) -> Elimination:
        return Elimination.of(stat.matrix(), damping=self.damping, act_order=False)

    def _run(
        self,
        w: Float[Tensor, "out in"],
        kept: Bool[Tensor, "out in"] | None,
        elimination: Elimination,
        inner: GridRounding | None = None,
    ) -> BlockPruner:
        shape = (w.shape[0], w.shape[1])
        pruner = BlockPruner(self.pattern(shape), shape, kept, inner)
        run = self.m or 1
        feed_back_blocks(w, elimination, pruner, run * max(1, self.block_size // run))
        return pruner


def _kept(weight: Weight) -> Bool[Tensor, "out in"] | None:
    """What earlier steps left; None: everything."""
    return weight.survivors() if isinstance(weight, Sparse | Masked) else None

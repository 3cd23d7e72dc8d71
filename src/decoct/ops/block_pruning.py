"""Pruning with feedback (arXiv 2301.00774): what drops is chosen block by block, from what its features have become."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from decoct.ops.blockwise import feed_back_blocks
from decoct.ops.feedback import Elimination, Rounding
from decoct.ops.sparsity import Pattern


class BlockPruner:
    """Rounds what drops to zero, and leaves the rest to another rounding, or as it is. A BlockRounding.

    A pattern whose runs are shorter than a row is chosen run by run, when the run's turn comes. Otherwise each block
    drops its share, so that rows, or the matrix, come to the pattern's count exactly.

    Its tensors have a row for each feature, which is what is worked on at a time.
    """

    def __init__(
        self,
        pattern: Pattern,
        shape: tuple[int, int],
        kept: Bool[Tensor, "out in"] | None = None,
        inner: Rounding | None = None,
    ) -> None:
        """Take a pattern for a matrix of a shape; what is not in `kept` drops, and counts."""
        out, width = shape
        self._pattern, self._inner = pattern, inner
        self._kept = torch.ones(shape, dtype=torch.bool) if kept is None else kept
        self._in_runs = pattern.run < width
        if not self._in_runs:
            self._alive = _running_sum(self._kept if pattern.run == width else self._kept.sum(0, keepdim=True))
            forced = pattern.run - self._alive[:, -1]
            self._extra = (pattern.num_dropped - forced).clamp(min=0)
        self._values = torch.empty(width, out)
        self._survivors = torch.empty(width, out, dtype=torch.bool)

    def __call__(self, start: int, values: Float[Tensor, "out n"], within: Elimination) -> Float[Tensor, "out n"]:
        """See ops.blockwise.BlockRounding."""
        if self._in_runs and values.shape[1] > self._pattern.run:
            feed_back_blocks(
                values, within, lambda first, run, inside: self(start + first, run, inside), self._pattern.run
            )
        else:
            stop = start + values.shape[1]
            score = values.abs() / torch.diagonal(within.upper)
            self._survivors[start:stop] = self._choose(score, start, stop).T
            within.run(values, _Feature(self, start))
        return self._values[start : start + values.shape[1]].T

    def round(self, column: Float[Tensor, " out"], feature: int, lost: Float[Tensor, " out"]) -> None:
        """See ops.feedback.Rounding."""
        value = torch.where(self._survivors[feature], column, 0.0)
        if self._inner is not None:
            self._inner(value, feature, lost)  # zero is on the grid: what dropped stays zero
            value -= lost
        self._values[feature] = value
        torch.sub(column, value, out=lost)

    def finish(self) -> tuple[Float[Tensor, "out in"], Bool[Tensor, "out in"]]:
        """What entries have become, float32, and which survive."""
        return self._values.T.contiguous(), self._survivors.T.contiguous()

    def _choose(self, score: Float[Tensor, "out n"], start: int, stop: int) -> Bool[Tensor, "out n"]:
        kept = self._kept[:, start:stop]
        if self._in_runs:
            return self._pattern.survivors(score, kept)
        counts = (~kept).sum(1) if self._extra.numel() > 1 else (~kept).sum().reshape(1)
        counts = counts + self._share(stop) - self._share(start)
        if self._extra.numel() == 1:
            return Pattern(int(counts), score.numel()).survivors(score, kept)
        order = score.masked_fill(~kept, -1.0).argsort(dim=1, stable=True)
        dropped = torch.arange(stop - start) < counts.unsqueeze(1)
        return torch.ones_like(kept).scatter_(1, order, ~dropped)

    def _share(self, stop: int) -> Int[Tensor, " rows"]:
        """Of the entries that are to drop beside those that did before: as many as features before `stop` hold."""
        if stop == 0:
            return torch.zeros_like(self._extra)
        total = self._alive[:, -1].clamp(min=1)
        return (2 * self._extra * self._alive[:, stop - 1] + total) // (2 * total)


class _Feature:
    """A block's rounding, which counts features from the block's first."""

    def __init__(self, pruner: BlockPruner, start: int) -> None:
        self._pruner, self._start = pruner, start

    def __call__(self, column: Float[Tensor, " out"], feature: int, lost: Float[Tensor, " out"]) -> None:
        self._pruner.round(column, self._start + feature, lost)


def _running_sum(counts: Tensor) -> Int[Tensor, "rows in"]:
    return counts.cumsum(1, dtype=torch.int64)

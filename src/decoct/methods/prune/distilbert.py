"""Every k-th block (DistilBERT, arXiv 1910.01108): what a smaller student begins with, to be trained afterwards."""

from dataclasses import dataclass

from typing_extensions import override

from decoct.methods.depth import Cuts, DepthMethod, Probe, whole


@dataclass(frozen=True, slots=True, kw_only=True)
class DistilBERT(DepthMethod):
    """Takes out blocks evenly over the depth; the first and the last stay. Needs no look at the model.

    See `DepthMethod`. What is left is far from the model that it was until a stage such as `distill` trains it.

    Attributes:
        keep: fraction of the blocks that stay, instead of `num_dropped`.
    """

    keep: float | None = None

    def __post_init__(self) -> None:
        DepthMethod.__post_init__(self)
        if self.keep is not None and not 0 < self.keep < 1:
            raise ValueError(f"keep must lie between 0 and 1, not {self.keep:g}")

    @override
    def check(self, num_blocks: int) -> None:
        """At least one block must stay, and one go."""
        if not 0 < self._left(num_blocks) < num_blocks:
            raise ValueError(f"of {num_blocks} blocks {self._left(num_blocks)} would be left; set keep or num_dropped")

    @override
    def choose(self, probe: Probe) -> Cuts:
        """All but those that lie evenly."""
        return self.guess(probe.num_blocks)

    @override
    def guess(self, num_blocks: int) -> Cuts:
        left = self._left(num_blocks)
        kept = {round(place * (num_blocks - 1) / max(1, left - 1)) for place in range(left)}
        return whole(block for block in range(num_blocks) if block not in kept)

    @override
    def passes(self, num_blocks: int) -> float:
        return 0.0

    def _left(self, num_blocks: int) -> int:
        return num_blocks - self.num_dropped if self.keep is None else round(self.keep * num_blocks)

"""ShortGPT (arXiv 2403.03853): take out the blocks that turn the residual stream least."""

from dataclasses import dataclass

from typing_extensions import override

from decoct.methods.depth import Cuts, DepthMethod, Probe, whole


@dataclass(frozen=True, slots=True, kw_only=True)
class ShortGPT(DepthMethod):
    """One pass, each block looked at alone; the baseline of every depth pruning paper. See `DepthMethod`."""

    @override
    def choose(self, probe: Probe) -> Cuts:
        """The blocks of least influence, 1 - E[cos(x, y)]; of equal ones the later."""
        found = probe.influences()
        return whole(sorted(range(probe.num_blocks), key=lambda block: (found[block], -block))[: self.num_dropped])

    @override
    def passes(self, num_blocks: int) -> float:
        return 1.0

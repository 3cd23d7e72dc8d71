"""Angular distance (arXiv 2403.17887): take out the run of consecutive blocks that turns the residual stream least."""

from dataclasses import dataclass

from typing_extensions import override

from decoct.methods.depth import Cuts, DepthMethod, Probe, whole


@dataclass(frozen=True, slots=True, kw_only=True)
class Angular(DepthMethod):
    """One pass. The paper looks at each sequence's last token; here every token counts. See `DepthMethod`."""

    @override
    def choose(self, probe: Probe) -> Cuts:
        """The run with the least mean angle between what enters and what leaves it."""
        found = probe.angles(self.num_dropped)
        first = min(range(len(found)), key=found.__getitem__)
        return whole(range(first, first + self.num_dropped))

    @property
    @override
    def window(self) -> int:
        return self.num_dropped

    @override
    def passes(self, num_blocks: int) -> float:
        return 1.0

"""SLEB (arXiv 2402.09025): take out one block after another, each time the one that the predictions miss least."""

from dataclasses import dataclass

from typing_extensions import override

from decoct.methods.depth import Cut, Cuts, DepthMethod, Probe, least


@dataclass(frozen=True, slots=True, kw_only=True)
class SLEB(DepthMethod):
    """Greedy. The paper measures perplexity; here it is the divergence from the whole model. See `DepthMethod`."""

    num_sequences: int = 8

    @override
    def choose(self, probe: Probe) -> Cuts:
        """Each round tries every block that is left, on top of what is out already."""
        found: Cuts = frozenset()
        while len(found) < self.num_dropped:
            options = [found | {Cut(block)} for block in range(probe.num_blocks) if Cut(block) not in found]
            found = options[least(probe.losses(options))]
        return found

    @override
    def passes(self, num_blocks: int) -> float:
        return sum((num_blocks - n) * 0.6 for n in range(self.num_dropped))

    @override
    def candidates(self, num_blocks: int) -> int:
        return num_blocks

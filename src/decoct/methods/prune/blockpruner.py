"""BlockPruner (arXiv 2406.10594): take out attentions and MLPs one by one, whichever the predictions miss least."""

from dataclasses import dataclass

from typing_extensions import override

from decoct.methods.depth import Cut, Cuts, DepthMethod, Probe, least


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockPruner(DepthMethod):
    """Greedy, attention and MLP apart, until as many parameters are out as `num_dropped` blocks have.

    The paper measures perplexity; here it is the divergence from the whole model. A block of which both are out goes
    altogether. One of which only one is out stays, with matrices that store nothing: decoct reads it, and an export
    to dense matrices has zeros there.

    Attributes:
        num_dropped: see DepthMethod; it counts parameters in blocks here.
        bridge: see DepthMethod.
        num_sequences: see DepthMethod.
        per_parameter: take what costs least divergence for each parameter; False: what costs least, as in the paper,
            which favours attentions since they are the smaller part.
    """

    num_sequences: int = 8
    per_parameter: bool = False

    @override
    def choose(self, probe: Probe) -> Cuts:
        """Each round tries every attention and MLP that is left and does not overshoot by more than half of itself."""
        found: Cuts = frozenset()
        base = 0.0
        while True:
            left = self.num_dropped - sum(map(probe.share, found))
            parts = [Cut(block, part) for block in range(probe.num_blocks) for part in ("attn", "mlp")]
            fitting = [cut for cut in parts if cut not in found and probe.share(cut) / 2 <= left]
            if not fitting:
                return found
            losses = probe.losses([found | {cut} for cut in fitting])
            worth = [
                (loss - base) / (probe.share(cut) if self.per_parameter else 1.0)
                for cut, loss in zip(fitting, losses, strict=True)
            ]
            best = least(worth)
            found, base = found | {fitting[best]}, losses[best]

    @override
    def guess(self, num_blocks: int) -> Cuts:
        """Attentions and MLPs of different blocks: such may come out, so later stages must be able to take them."""
        attentions = frozenset(Cut(num_blocks - 1 - n, "attn") for n in range(self.num_dropped))
        return attentions | frozenset(Cut(n, "mlp") for n in range(self.num_dropped))

    @override
    def passes(self, num_blocks: int) -> float:
        return sum((2 * num_blocks - n) * 0.6 for n in range(3 * self.num_dropped))

    @override
    def candidates(self, num_blocks: int) -> int:
        return 2 * num_blocks

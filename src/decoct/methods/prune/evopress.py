"""EvoPress for depth (arXiv 2410.14649): swap blocks that are out for others, keep what the predictions gain by.

One parent. In every generation its offspring are judged on few sequences, the better ones on more; the last one is
judged on all of them, and becomes the next parent if it is better.
"""

from dataclasses import dataclass
from random import Random

from typing_extensions import override

from decoct.methods.depth import Cut, Cuts, DepthMethod, Probe, least, whole
from decoct.methods.elimination import elimination_rounds

_ATTEMPTS = 64  # mutations tried for one that is new


@dataclass(frozen=True, slots=True, kw_only=True)
class EvoPress(DepthMethod):
    """Finds blocks that can be missed together, which no greedy choice does. See `DepthMethod`.

    The search begins with what SLEB's first round would choose: the blocks that are missed least one by one.

    Attributes:
        num_dropped: see DepthMethod.
        bridge: see DepthMethod.
        num_sequences: see DepthMethod.
        generations: how often offspring are made.
        offspring: of each generation.
        seed: of the mutations.
    """

    num_sequences: int = 8
    generations: int = 12
    offspring: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        DepthMethod.__post_init__(self)
        if self.generations < 1 or self.offspring < 1:
            raise ValueError("generations and offspring must be at least 1")

    @override
    def choose(self, probe: Probe) -> Cuts:
        """The best parent of all generations."""
        alone = probe.losses([whole([block]) for block in range(probe.num_blocks)])
        order = sorted(range(probe.num_blocks), key=alone.__getitem__)
        parent, best = whole(order[: self.num_dropped]), float("inf")
        rounds = elimination_rounds(self.offspring, probe.num_sequences)
        for generation in range(self.generations):
            rng = Random(f"{self.seed} {generation}")  # noqa: S311 - chance, not secrets
            tried: list[Cuts] = []
            for _ in range(self.offspring):
                child = _child(parent, tried, probe.num_blocks, rng)
                tried += [] if child is None else [child]
            tried = _survivors(tried, rounds[:-1], probe)
            finalists = [parent, *tried] if generation == 0 else tried
            losses = probe.losses(finalists) if finalists else []
            for cuts, loss in zip(finalists, losses, strict=True):
                if loss < best:
                    parent, best = cuts, loss
        least([best])  # raises where nothing was finite
        return parent

    @override
    def passes(self, num_blocks: int) -> float:
        judged, tried = 0.0, self.offspring
        for count, sequences in elimination_rounds(self.offspring, self.num_sequences):
            judged += tried * sequences / self.num_sequences
            tried = count
        return 0.6 * num_blocks + 0.9 * self.generations * judged

    @override
    def candidates(self, num_blocks: int) -> int:
        return max(num_blocks, self.offspring + 1)


def _survivors(tried: list[Cuts], rounds: list[tuple[int, int]], probe: Probe) -> list[Cuts]:
    """What elimination rounds leave; of equal ones the earlier."""
    for count, sequences in rounds:
        if len(tried) > count:
            losses = probe.losses(tried, sequences)
            best = sorted(range(len(tried)), key=losses.__getitem__)[:count]
            tried = [tried[number] for number in sorted(best)]
    return tried


def _child(parent: Cuts, tried: list[Cuts], num_blocks: int, rng: Random) -> Cuts | None:
    """A parent with one to three blocks swapped, few more often than many; None if chance finds none that is new."""
    for _ in range(_ATTEMPTS):
        out = sorted(parent)
        kept = [Cut(block) for block in range(num_blocks) if Cut(block) not in parent]
        most = min(len(out), len(kept), 3)
        count = min(rng.randint(1, most), rng.randint(1, most))
        child = (parent - frozenset(rng.sample(out, count))) | frozenset(rng.sample(kept, count))
        if child != parent and child not in tried:
            return child
    return None

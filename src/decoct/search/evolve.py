"""EvoPress (arXiv 2410.14649): change a choice at random, keep what the true divergence says is better.

One parent. In every generation its offspring have a few groups' levels raised and others' lowered, so that the budget
holds; they are judged on few sequences, the better ones on more, and the last ones, together with the parent, on all.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from decoct.methods.elimination import elimination_rounds
from decoct.search.settings import Search

Options = tuple[int, ...]
"""The number of the option that each group takes."""

Fitness = Callable[[Sequence[Options], int], list[float]]
"""Divergences of some choices, on so many sequences."""

_WORTH = 1e-3  # of the divergence: a generation that lowers it by less is idle
_MOST_CHANGES = 3  # groups that a mutation raises
_ATTEMPTS = 64  # mutations tried for one that is new


@dataclass(frozen=True, slots=True)
class Generation:
    """Where an evolution stands.

    Attributes:
        number: generations done.
        parent: the best choice so far.
        divergence: its own, on all sequences; None before the first generation.
        first: that of the choice that the evolution began with; None as above.
        idle: of the last generations, how many in a row brought next to nothing.
    """

    number: int
    parent: Options
    divergence: float | None = None
    first: float | None = None
    idle: int = 0

    def ended(self, search: Search) -> bool:
        """Whether there is nothing left to do."""
        return self.number >= search.generations or self.idle >= search.patience


def evolve(
    begin: Generation,
    sizes: Sequence[Sequence[int]],
    budget: int,
    fitness: Fitness,
    search: Search,
    num_sequences: int,
    keep: Callable[[Generation], None],
) -> Generation:
    """Go on from a generation; the same seed gives the same choices, wherever an earlier process stopped.

    Args:
        begin: where to start.
        sizes: of each group's options, rising; bytes, or weights kept.
        budget: for all groups together; the first parent must keep it.
        fitness: measures choices.
        search: the most generations, those before `begin` included; patience; offspring; the seed of the mutations.
        num_sequences: the most that `fitness` can measure on.
        keep: called after every generation.
    """
    now = begin
    rounds = elimination_rounds(search.offspring, num_sequences)
    while not now.ended(search):
        rng = Random(f"{search.seed} {now.number}")  # noqa: S311 - chance, not secrets
        tried: list[Options] = []
        for _ in range(search.offspring):
            child = _new(now.parent, tried, sizes, budget, rng)
            tried += [] if child is None else [child]
        for count, sequences in rounds[:-1]:
            if len(tried) > count:
                scores = fitness(tried, sequences)
                best = sorted(range(len(tried)), key=lambda n, scores=scores: (scores[n], n))[:count]  # type: ignore[misc]
                tried = [tried[n] for n in sorted(best)]
        known = [] if now.divergence is None else [now.divergence]
        finalists = [*([] if known else [now.parent]), *tried]
        scores = [*known, *fitness(finalists, num_sequences)] if finalists else known
        everyone = [now.parent, *tried]
        winner = min(range(len(everyone)), key=lambda n: (scores[n], n))
        first = scores[0] if now.first is None else now.first
        idle = now.idle + 1 if scores[0] - scores[winner] <= _WORTH * abs(scores[0]) else 0
        now = Generation(now.number + 1, everyone[winner], scores[winner], first, idle)
        keep(now)
    return now


def mutate(parent: Options, sizes: Sequence[Sequence[int]], budget: int, rng: Random) -> Options:
    """Raise one to three groups by a step, few more often than many; lower others until the budget holds again.

    What the lowering leaves over is given to groups that it is enough for, so that a choice stays within one step of
    the budget.
    """
    options = list(parent)
    raised = set()
    for _ in range(min(rng.randint(1, _MOST_CHANGES), rng.randint(1, _MOST_CHANGES))):
        open_ones = [g for g in range(len(options)) if g not in raised and options[g] + 1 < len(sizes[g])]
        if open_ones:
            group = rng.choice(open_ones)
            options[group] += 1
            raised.add(group)
    spent = sum(sizes[g][o] for g, o in enumerate(options))
    lowered = set()
    while spent > budget:
        open_ones = [g for g in range(len(options)) if g not in raised and options[g] > 0]
        if not open_ones:
            return parent
        group = rng.choice(open_ones)
        spent += sizes[group][options[group] - 1] - sizes[group][options[group]]
        options[group] -= 1
        lowered.add(group)
    order = [g for g in range(len(options)) if g not in lowered]
    rng.shuffle(order)
    for group in order:
        if options[group] + 1 < len(sizes[group]):
            step = sizes[group][options[group] + 1] - sizes[group][options[group]]
            if spent + step <= budget:
                options[group] += 1
                spent += step
    return tuple(options)


def _new(
    parent: Options, tried: Sequence[Options], sizes: Sequence[Sequence[int]], budget: int, rng: Random
) -> Options | None:
    """A mutation that is not the parent and was not tried yet; None if chance finds none."""
    for _ in range(_ATTEMPTS):
        child = mutate(parent, sizes, budget, rng)
        if child != parent and child not in tried:
            return child
    return None

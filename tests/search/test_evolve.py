"""Mutations keep the budget, selection keeps the better, and a stopped evolution goes on as if nothing had happened."""

from collections.abc import Sequence
from random import Random

import pytest

from decoct.search.evolve import Generation, Options, evolve, mutate
from decoct.search.settings import Search

SIZES = [[entries * bits for bits in (2, 3, 4, 6, 8)] for entries in (10, 30, 10, 20, 40, 10)]
BUDGET = 500
START: Options = (1, 1, 1, 1, 1, 1)
WANTED = (4, 1, 4, 1, 0, 3)


def spent(options: Options) -> int:
    return sum(SIZES[g][o] for g, o in enumerate(options))


def far(several: Sequence[Options], num_sequences: int) -> list[float]:
    """Distance from what is wanted; on few sequences it is seen less clearly."""
    blur = 1.0 / num_sequences
    return [
        sum(abs(o - w) for o, w in zip(each, WANTED, strict=True)) + blur * Random(str(each)).random()  # noqa: S311
        for each in several
    ]


@pytest.mark.parametrize("seed", range(50))
def test_mutations_keep_the_budget_and_use_it(seed: int) -> None:
    rng = Random(seed)  # noqa: S311
    parent = START
    for _ in range(20):
        child = mutate(parent, SIZES, BUDGET, rng)
        assert spent(child) <= BUDGET
        parent = child
    assert BUDGET - spent(parent) < 40 * 2  # the largest step


def test_a_group_that_gains_is_paid_for_by_others() -> None:
    tight = spent(START)
    children = {mutate(START, SIZES, tight, Random(seed)) for seed in range(40)}  # noqa: S311
    assert len(children) > 10
    for child in children - {START}:
        assert any(a > b for a, b in zip(child, START, strict=True))
        assert any(a < b for a, b in zip(child, START, strict=True))


def test_it_comes_closer_and_may_be_stopped_anywhere() -> None:
    kept: list[Generation] = []
    search = Search(bits=3, generations=30, patience=30, offspring=16)
    found = evolve(Generation(0, START), SIZES, BUDGET, far, search, 8, kept.append)
    assert found.number == 30
    assert found.divergence is not None
    assert found.first is not None
    assert found.divergence < found.first / 2
    assert spent(found.parent) <= BUDGET
    scores = [each.divergence for each in kept]
    assert scores == sorted(scores, reverse=True)
    for stopped in kept[::7]:
        assert evolve(stopped, SIZES, BUDGET, far, search, 8, lambda _: None) == found
    other: list[Generation] = []
    evolve(Generation(0, START), SIZES, BUDGET, far, search.model_copy(update={"seed": 1}), 8, other.append)
    assert other[:5] != kept[:5]


def test_most_offspring_are_judged_on_few_sequences() -> None:
    asked: list[tuple[int, int]] = []

    def fitness(several: Sequence[Options], num_sequences: int) -> list[float]:
        asked.append((len(several), num_sequences))
        return far(several, num_sequences)

    evolve(Generation(0, START), SIZES, BUDGET, fitness, Search(bits=3, generations=2), 8, lambda _: None)
    # The first generation's finalists are compared with the parent, whose divergence is known from then on.
    assert asked == [(16, 2), (5, 8), (16, 2), (4, 8)]


def test_it_ends_when_nothing_gets_better() -> None:
    asked = []

    def fitness(several: Sequence[Options], num_sequences: int) -> list[float]:
        asked.append(num_sequences)
        return [1.0 - 1e-5 * len(asked)] * len(several)  # a little better, every time

    kept: list[Generation] = []
    search = Search(bits=3, generations=30, patience=4)
    found = evolve(Generation(0, START), SIZES, BUDGET, fitness, search, 8, kept.append)
    assert [each.idle for each in kept] == [1, 2, 3, 4]
    assert found == kept[-1]
    assert evolve(kept[1], SIZES, BUDGET, fitness, search, 8, lambda _: None).number == 4
    assert found.ended(search)
    asked.clear()
    assert evolve(found, SIZES, BUDGET, fitness, search, 8, kept.append) == found
    assert not asked


def test_nothing_to_change() -> None:
    sizes = [[10], [20]]
    found = evolve(
        Generation(0, (0, 0)), sizes, 30, lambda some, _: [1.0] * len(some), Search(bits=3), 4, lambda _: None
    )
    assert found.parent == (0, 0)

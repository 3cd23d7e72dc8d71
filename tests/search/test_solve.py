"""The integer programme against trying everything."""

import itertools
import random
import sys

import pytest

pytest.importorskip("scipy", reason="searching is an extra: pip install 'decoct[search]'")

from decoct.search.solve import solve


def brute_force(costs: list[list[float]], sizes: list[list[int]], budget: int) -> float:
    """The least total cost of all combinations that fit, one after another."""
    best = float("inf")
    for options in itertools.product(*(range(len(each)) for each in costs)):
        if sum(sizes[g][o] for g, o in enumerate(options)) <= budget:
            best = min(best, sum(costs[g][o] for g, o in enumerate(options)))
    return best


@pytest.mark.parametrize("seed", range(40))
def test_it_is_the_best_of_all_choices(seed: int) -> None:
    rng = random.Random(seed)  # noqa: S311
    unit = rng.choice([1, 7, 4096])
    groups = rng.randint(1, 6)
    sizes = [sorted(unit * rng.randint(1, 1000) for _ in range(rng.randint(1, 4))) for _ in range(groups)]
    # Costs of very different sizes, as matrices' are, and not always falling with the bits.
    costs = [[10 ** rng.uniform(-6, 1) for _ in each] for each in sizes]
    low, high = sum(each[0] for each in sizes), sum(each[-1] for each in sizes)
    budget = rng.randint(low, high)
    found = solve(costs, sizes, budget)
    assert sum(sizes[g][o] for g, o in enumerate(found)) <= budget
    total = sum(costs[g][o] for g, o in enumerate(found))
    assert total == pytest.approx(brute_force(costs, sizes, budget), rel=1e-9)


def test_a_budget_that_is_met_to_the_byte_is_not_exceeded() -> None:
    assert solve([[2.0, 1.0], [2.0, 1.0]], [[10, 20], [10, 20]], 40) == [1, 1]
    assert sorted(solve([[2.0, 1.0], [2.0, 1.0]], [[10, 20], [10, 20]], 39)) == [0, 1]
    assert solve([[2.0, 1.0], [2.0, 1.0]], [[10, 20], [10, 20]], 20) == [0, 0]


def test_a_whole_models_worth_of_groups() -> None:
    rng = random.Random(0)  # noqa: S311
    widths = (2, 3, 4, 5, 6, 8)
    entries = [rng.choice([331776, 884736, 442368]) for _ in range(120)]
    sizes = [[each // 8 * b for b in widths] for each in entries]
    costs = [[rng.uniform(0.1, 10) * 4.0**-b for b in widths] for _ in range(120)]
    budget = int(sum(each[1] for each in sizes) * 1.03)
    found = solve(costs, sizes, budget)
    spent = sum(each[o] for each, o in zip(sizes, found, strict=True))
    assert budget - spent < min(each[1] - each[0] for each in sizes)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"smallest choice takes 30 bytes, the budget is 29; raise"):
        solve([[1.0], [1.0]], [[10], [20]], 29)
    with pytest.raises(ValueError, match="not finite"):
        solve([[float("nan")]], [[10]], 29)


def test_without_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ValueError, match=r"pip install 'decoct\[search\]'"):
        solve([[1.0]], [[10]], 29)

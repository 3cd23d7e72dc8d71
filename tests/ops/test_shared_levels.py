"""Levels that are learned: as good as the best there are, and the same however numbers arrive."""

import pytest
import torch

from decoct.ops.shared_levels import LevelCounts
from tests.reference.kvquant import error_of, least_error


def numbers(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, generator=generator) ** 2, torch.rand(n, generator=generator) ** 4


@pytest.mark.parametrize("count", [4, 8])
def test_no_levels_are_better(count: int) -> None:
    x, weights = numbers(60)
    found = LevelCounts().add(x, weights).levels(count)
    lists = x.double().tolist(), weights.double().tolist()
    best = least_error(*lists, count)
    assert best <= error_of(*lists, found.double().tolist()) < 1.05 * best
    uniform = error_of(*lists, [i / (count - 1) for i in range(count)])
    assert best < 0.5 * uniform


def test_weights_draw_levels() -> None:
    x = torch.cat([torch.linspace(0, 0.5, 500), torch.linspace(0.5, 1, 500)])
    alike = LevelCounts().add(x, torch.ones(1000)).levels(8)
    drawn = LevelCounts().add(x, (x > 0.5) * 99.0 + 1).levels(8)
    assert int((alike > 0.5).sum()) == 4
    assert int((drawn > 0.5).sum()) >= 6


def test_pieces_add_up() -> None:
    x, weights = numbers(3000, 1)
    whole, pieces = LevelCounts().add(x, weights), LevelCounts()
    for part in torch.arange(3000).split(700):
        pieces.add(x[part], weights[part])
    torch.testing.assert_close(pieces.levels(16), whole.levels(16))


def test_what_lies_outside_counts_as_an_end_and_few_numbers_do() -> None:
    found = LevelCounts().add(torch.tensor([-0.5, 2.0]), torch.ones(2)).levels(4)
    assert float(found.min()) == 0
    assert float(found.max()) == 1
    assert bool((found.diff() >= 0).all())


def test_damage() -> None:
    with pytest.raises(ValueError, match="NaN or infinite"):
        LevelCounts().add(torch.tensor([0.5]), torch.tensor([torch.inf])).levels(4)

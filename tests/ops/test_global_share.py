"""One threshold for all groups: the sum is met, every group keeps some, and what stands out most stays."""

import pytest
import torch

from decoct.ops.global_share import global_share
from tests.reference.inputs import gaussian


def groups(seed: int) -> list[torch.Tensor]:
    return [gaussian(size, seed=seed + size).exp() * 1.5**size for size in (24, 16, 40)]


@pytest.mark.parametrize("num_kept", [3, 31, 60, 80])
def test_the_best_of_all_stay(num_kept: int) -> None:
    """With steps of one nothing is rounded: the numbers are those above a threshold."""
    scores = groups(1)
    found = global_share(scores, num_kept, 1)
    standard = [(each - each.mean()) / each.std(correction=0) for each in (s.double() for s in scores)]
    threshold = torch.cat(standard).sort(descending=True).values[num_kept - 1]
    expected = [max(1, int((each >= threshold).sum())) for each in standard]
    assert sum(found) == num_kept
    assert sum(abs(a - b) for a, b in zip(found, expected, strict=True)) <= 4, "each group keeps one at least"


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("num_kept", [24, 40, 72])
def test_multiples_that_add_up(seed: int, num_kept: int) -> None:
    found = global_share(groups(seed), num_kept, 8)
    assert sum(found) == num_kept
    assert all(count % 8 == 0 and 8 <= count <= size for count, size in zip(found, (24, 16, 40), strict=True))


def test_scales_of_groups_do_not_matter() -> None:
    scores = groups(2)
    assert global_share(scores, 40, 4) == global_share([s * 7.0**n for n, s in enumerate(scores)], 40, 4)


def test_groups_without_differences() -> None:
    assert sum(global_share([torch.ones(8), torch.ones(8)], 8, 4)) == 8


def test_damaged_scores_are_named() -> None:
    with pytest.raises(ValueError, match="NaN or infinite"):
        global_share([torch.tensor([1.0, torch.nan])], 1, 1)

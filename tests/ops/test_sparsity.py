"""Patterns against sorting, with ties, earlier masks and scores that are not finite."""

import pytest
import torch

from decoct.ops.sparsity import Pattern
from tests.reference import pruning as reference

ROWS, COLS = 6, 48


def scores(levels: int, seed: int = 0) -> torch.Tensor:
    """Few levels: most scores are ties."""
    return torch.randint(0, levels, (ROWS, COLS), generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize("levels", [1, 2, 5, 1000])
@pytest.mark.parametrize(
    ("num_dropped", "run"), [(2, 4), (1, 3), (7, 8), (5, 16), (11, 24), (24, 48), (1, 48), (100, 288)]
)
def test_survivors_are_those_of_a_sort(num_dropped: int, run: int, levels: int) -> None:
    score = scores(levels)
    found = Pattern(num_dropped, run).survivors(score)
    assert found.tolist() == reference.lowest_drop(score.tolist(), num_dropped, run)
    assert (found.reshape(-1, run).sum(1) == run - num_dropped).all()


@pytest.mark.parametrize(("num_dropped", "run"), [(2, 4), (24, 48), (150, 288)])
def test_what_dropped_before_drops_first_and_counts(num_dropped: int, run: int) -> None:
    score = scores(4)
    kept = torch.rand(ROWS, COLS, generator=torch.Generator().manual_seed(1)) < 0.7
    found = Pattern(num_dropped, run).survivors(score, kept)
    assert found.tolist() == reference.lowest_drop(score.tolist(), num_dropped, run, kept.tolist())
    assert not (found & ~kept).any()
    left = torch.minimum(kept.reshape(-1, run).sum(1), torch.tensor(run - num_dropped))
    assert torch.equal(found.reshape(-1, run).sum(1), left)


def test_nothing_to_drop_leaves_all() -> None:
    kept = scores(2) > 0
    assert Pattern(0, COLS).survivors(scores(9)).all()
    assert torch.equal(Pattern(0, COLS).survivors(scores(9), kept), kept)


@pytest.mark.parametrize("run", [4, COLS, ROWS * COLS])
def test_infinite_scores_survive_and_nan_is_refused(run: int) -> None:
    score = scores(1000)
    score[2, 5] = torch.inf
    assert Pattern(run - 1, run).survivors(score)[2, 5]
    score[2, 6] = torch.nan
    with pytest.raises(ValueError, match=r"^[^\n]*NaN or infinite values; check"):
        Pattern(1, run).survivors(score)

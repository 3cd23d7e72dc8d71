"""DSnoT against its definition, swap by swap; and what it must keep and refuse."""

import pytest
import torch

from decoct.methods.prune.alps import ALPS
from decoct.methods.prune.dsnot import DSnoT
from decoct.methods.prune.magnitude import Magnitude
from decoct.methods.prune.wanda import Wanda
from decoct.methods.quantize.rtn import RTN
from decoct.ops.swapping import run_of
from decoct.stats import ColumnNorm, Gram, Moments
from decoct.weights import Dense, Masked, Sparse, Weight
from tests.reference import pruning as reference
from tests.reference.inputs import correlated, gaussian, output_error

OUT, IN = 12, 32


def shifted(seed: int = 0) -> torch.Tensor:
    """Inputs with means of their own, as those after an activation function have."""
    return correlated(150, IN, seed) + gaussian(IN, seed=seed + 9) * torch.linspace(0, 4, IN)


def moments(x: torch.Tensor) -> Moments:
    stat = Moments.empty(x.shape[1])
    stat.add(x)
    return stat


def check(before: Sparse, after: Weight, w: torch.Tensor, x: torch.Tensor, run: int, most: int) -> None:
    assert isinstance(after, Sparse)
    stat = moments(x)
    expected = reference.swaps(
        before.unpack().tolist(),
        w.tolist(),
        before.survivors().tolist(),
        stat.mean.tolist(),
        stat.variance().tolist(),
        run,
        most,
    )
    assert after.survivors().tolist() == expected
    came = after.survivors() & ~before.survivors()
    assert came.any()
    assert torch.equal(after.unpack()[came], w[came])
    stayed = after.survivors() & before.survivors()
    assert torch.equal(after.unpack()[stayed], before.unpack()[stayed])


@pytest.mark.parametrize("most", [1, 3, 50])
@pytest.mark.parametrize(
    ("pruning", "run"), [(Magnitude(), IN), (Magnitude(scope="layer"), IN), (Magnitude(n=2, m=4), 4)]
)
def test_swaps_are_the_references(pruning: Magnitude, run: int, most: int) -> None:
    w, x = gaussian(OUT, IN), shifted()
    before = pruning.compress(Dense.of(w))
    assert isinstance(before, Sparse)
    assert run_of(before.survivors()) == run
    after = DSnoT(num_swaps=most).correct(before, moments(x), Dense.of(w))
    check(before, after, w, x, run, most)
    assert isinstance(after, Sparse)
    for length in (run, IN):
        counts = [each.survivors().reshape(-1, length).sum(1) for each in (before, after)]
        assert torch.equal(*counts)


def test_a_long_pattern_is_kept() -> None:
    width = 128
    w, x = gaussian(OUT, width), correlated(150, width) + gaussian(width, seed=9) * torch.linspace(0, 4, width)
    before = Magnitude(n=32, m=64).compress(Dense.of(w))
    after = DSnoT().correct(before, moments(x), Dense.of(w))
    assert isinstance(after, Sparse)
    assert not torch.equal(after.unpack(), before.unpack())
    assert (after.survivors().reshape(-1, 64).sum(1) == 32).all()


def test_survivors_that_moved_stay_where_they_are() -> None:
    w, x = gaussian(OUT, IN), shifted()
    gram = Gram.empty(IN)
    gram.add(x)
    before = ALPS(sparsity=0.7).compress(Dense.of(w), gram)
    assert isinstance(before, Sparse)
    noisy = Sparse.of(before.unpack() * 1.3, before.survivors())
    check(noisy, DSnoT().correct(noisy, moments(x), Dense.of(w)), w, x, IN, 50)


def test_a_matrix_that_nothing_pruned_is_refused() -> None:
    with pytest.raises(ValueError, match="put wanda, sparsegpt or their like before it"):
        DSnoT().correct(Dense.of(torch.eye(4)), Moments.neutral(4), Dense.of(torch.eye(4)))


def test_where_inputs_have_means_the_output_error_falls() -> None:
    w, x = gaussian(OUT, IN), shifted()
    norm = ColumnNorm.empty(IN)
    norm.add(x)
    for before in (Magnitude().compress(Dense.of(w)), Wanda().compress(Dense.of(w), norm)):
        after = DSnoT().correct(before, moments(x), Dense.of(w))
        assert output_error(after.unpack() - w, x) < 0.95 * output_error(before.unpack() - w, x)


def test_inputs_without_a_mean_leave_nothing_to_swap() -> None:
    w = gaussian(OUT, IN)
    before = Magnitude().compress(Dense.of(w))
    after = DSnoT().correct(before, Moments.neutral(IN), Dense.of(w))
    assert torch.equal(after.unpack(), before.unpack())


def test_a_masked_matrix_stays_one_and_codes_are_refused() -> None:
    w, x = gaussian(OUT, IN), shifted()
    sparse = Magnitude().compress(Dense.of(w))
    assert isinstance(sparse, Sparse)
    masked = Masked.of(Dense.of(sparse.unpack()), sparse.survivors())
    after = DSnoT().correct(masked, moments(x), Dense.of(w))
    assert isinstance(after, Masked)
    assert torch.equal(after.unpack(), DSnoT().correct(sparse, moments(x), Dense.of(w)).unpack())
    with pytest.raises(ValueError, match=r"\Adsnot cannot be applied to a Masked\(GroupInt[^\n]*\Z"):
        DSnoT().correct(RTN(group_size=16).compress(sparse), moments(x), Dense.of(w))


def test_dead_columns_and_bad_numbers() -> None:
    w, x = gaussian(OUT, IN), shifted()
    before = Magnitude().compress(Dense.of(w))
    x[:, 4] = 0
    assert bool(torch.isfinite(DSnoT().correct(before, moments(x), Dense.of(w)).unpack()).all())
    x[3, 4] = torch.nan
    with pytest.raises(ValueError, match=r"\A[^\n]*NaN or infinite values; check[^\n]*\Z"):
        DSnoT().correct(before, moments(x), Dense.of(w))
    with pytest.raises(ValueError, match="num_swaps must be at least 1"):
        DSnoT(num_swaps=0)


def test_a_pattern_is_found_and_chance_is_not_one() -> None:
    assert run_of(torch.tensor([[True, False, False, True] * 4] * 3)) == 2
    assert run_of(torch.tensor([[True, True, False, False] * 4] * 3)) == 4
    long = Magnitude(n=32, m=64).compress(Dense.of(gaussian(8, 192)))
    assert isinstance(long, Sparse)
    assert run_of(long.survivors()) == 64
    assert run_of(torch.ones(3, 16, dtype=torch.bool)) == 16
    assert run_of(torch.rand(8, 64, generator=torch.Generator().manual_seed(0)) < 0.5) == 64

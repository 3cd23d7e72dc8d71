"""Input statistics: right, mergeable in any division, and close to float64 whatever the inputs' dtype."""

from typing import Any

import pytest
import torch

from decoct.stats import AbsMax, ColumnNorm, Gram, Moments
from tests.reference import stats as reference
from tests.reference.inputs import correlated, gaussian

KINDS = [Gram, ColumnNorm, AbsMax, Moments]
EVERY = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)


def of(kind: Any, *batches: torch.Tensor) -> Any:
    stat = kind.empty(batches[0].shape[1])
    for x in batches:
        stat.add(x)
    return stat


def state(stat: Any) -> dict[str, torch.Tensor]:
    found = {name: value for name, value in vars(stat).items() if isinstance(value, torch.Tensor)}
    if isinstance(stat, Gram):
        found["total"] = found["total"].triu()  # what lies below the diagonal is no part of it
    return found


def check_same(found: Any, expected: Any) -> None:
    assert found.num_tokens == expected.num_tokens
    for name, tensor in state(expected).items():
        torch.testing.assert_close(state(found)[name], tensor, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_all_are_the_references_sums(dtype: torch.dtype) -> None:
    x = correlated(30, 10).to(dtype)
    rows = x.double().tolist()
    double = {"rtol": 1e-5, "atol": 1e-5, "check_dtype": False}
    gram = torch.tensor(reference.gram(rows), dtype=torch.float64)
    torch.testing.assert_close(of(Gram, x).matrix(torch.float64), gram * 2 / 30, **double)
    squares = torch.tensor(reference.square_sum(rows), dtype=torch.float64)
    torch.testing.assert_close(of(ColumnNorm, x).norm(), (squares / 30).sqrt(), **double)
    assert of(AbsMax, x).maximum.tolist() == reference.abs_max(rows)
    moments, expected = of(Moments, x), reference.moments(rows)
    for found, numbers in zip((moments.mean, moments.mean_abs, moments.variance()), expected, strict=True):
        torch.testing.assert_close(found, torch.tensor(numbers, dtype=torch.float64))


@EVERY
def test_batches_and_merged_shards_are_one_pass(kind: Any) -> None:
    x = correlated(41, 12)
    whole = of(kind, x)
    assert whole.num_tokens == 41
    check_same(of(kind, x[:1], x[1:20], x[20:]), whole)
    a, b, c = of(kind, x[:7]), of(kind, x[7:8]), of(kind, x[8:])
    check_same(a.merge(b).merge(c), whole)
    check_same(c.merge(a.merge(b)), whole)
    check_same(kind.empty(12).merge(whole).merge(kind.empty(12)), whole)
    check_same(kind.empty(12).merge(kind.empty(12)), kind.empty(12))


@EVERY
def test_merging_changes_neither(kind: Any) -> None:
    a, b = of(kind, gaussian(5, 4)), of(kind, gaussian(6, 4, seed=1))
    before = {name: tensor.clone() for name, tensor in state(a).items()}
    merged = a.merge(b)
    merged.add(gaussian(3, 4, seed=2))
    check_same(of(kind, gaussian(5, 4)), a)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(a).items())
    assert (a.num_tokens, b.num_tokens, merged.num_tokens) == (5, 6, 14)


@EVERY
def test_a_batch_without_tokens_changes_nothing(kind: Any) -> None:
    """An expert that the router passed over in one batch of several."""
    stat = of(kind, gaussian(5, 4), torch.zeros(0, 4))
    check_same(stat, of(kind, gaussian(5, 4)))


@EVERY
def test_inputs_are_not_changed_and_nbytes_is_declared(kind: Any) -> None:
    x = gaussian(5, 12)
    before = x.clone()
    stat = of(kind, x)
    assert torch.equal(x, before)
    assert sum(t.nbytes for t in vars(stat).values() if isinstance(t, torch.Tensor)) == kind.nbytes_for(12)


@EVERY
def test_neutral_counts_as_seen_and_treats_features_alike(kind: Any) -> None:
    stat = kind.neutral(6)
    assert stat.num_tokens > 0
    for tensor in state(stat).values():
        assert torch.equal(tensor, tensor.T.flip(0).T.flip(-1) if tensor.ndim == 2 else tensor[:1].expand(6))


def test_neutral_values() -> None:
    assert torch.equal(Gram.neutral(3).matrix(), 2 * torch.eye(3))
    assert ColumnNorm.neutral(3).norm().tolist() == [1, 1, 1]
    assert AbsMax.neutral(3).maximum.tolist() == [1, 1, 1]
    assert Moments.neutral(3).variance().tolist() == [1, 1, 1]


def test_no_tokens_is_said_and_not_divided_by() -> None:
    for read in (Gram.empty(3).matrix, ColumnNorm.empty(3).norm, Moments.empty(3).variance):
        with pytest.raises(ValueError, match="no calibration token reached this layer"):
            read()


@pytest.mark.parametrize("width", [24, 520])  # the wider one has a ragged tile below the diagonal
def test_gram_of_bfloat16_inputs_is_symmetric_positive_and_near_float64(width: int) -> None:
    x = correlated(96, width).bfloat16()
    stat = of(Gram, x[:40], x[40:])
    H = stat.matrix()
    exact = 2 / 96 * x.double().T @ x.double()
    assert H.dtype == torch.float32
    assert torch.equal(H, H.T)
    assert float((H.double() - exact).abs().max()) <= 1e-5 * float(exact.abs().max())
    shifted = H.double() + 1e-5 * exact.diagonal().mean() * torch.eye(width)  # semidefinite but for rounding
    assert int(torch.linalg.cholesky_ex(shifted).info) == 0
    wide = of(Gram, x.float()[:40], x.float()[40:]).matrix()
    torch.testing.assert_close(H, wide, rtol=1e-5, atol=1e-5 * float(exact.abs().max()))


def test_bfloat16_sums_leave_other_products_in_full_precision() -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision
    of(Gram, gaussian(8, 16).bfloat16())
    assert torch.backends.mkldnn.matmul.fp32_precision == before


@pytest.mark.parametrize("width", [12, 520])
def test_gram_through_a_factor_is_the_gram_of_what_it_puts_out(width: int) -> None:
    x, right = correlated(40, width), gaussian(5, width, seed=3)
    found = of(Gram, x).through(right)
    assert found.num_tokens == 40
    expected = of(Gram, x.double().float() @ right.T)
    torch.testing.assert_close(found.matrix(), expected.matrix(), rtol=1e-3, atol=1e-3 * float(expected.matrix().max()))


def test_column_norms_do_not_go_through_a_factor() -> None:
    with pytest.raises(ValueError, match="prune before factorizing"):
        ColumnNorm.neutral(4).through(torch.eye(4))

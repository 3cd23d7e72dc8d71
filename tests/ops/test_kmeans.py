"""Weighted k-means against the exact optimum."""

import pytest
import torch

from decoct.ops.kmeans import weighted_kmeans
from tests.reference import kmeans as reference
from tests.reference.inputs import gaussian


def errors(values: torch.Tensor, weights: torch.Tensor, centers: torch.Tensor) -> list[float]:
    rows = zip(values.double().tolist(), weights.double().expand_as(values).tolist(), centers.tolist(), strict=True)
    return [reference.error(v, w, c) for v, w, c in rows]


def optima(values: torch.Tensor, weights: torch.Tensor, num_centers: int) -> list[float]:
    rows = zip(values.double().tolist(), weights.double().expand_as(values).tolist(), strict=True)
    return [reference.least_error(v, w, num_centers) for v, w in rows]


def heavy(rows: int, n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Values with heavy tails, and weights that differ by orders of magnitude."""
    return gaussian(rows, n, seed=seed) ** 3, gaussian(rows, n, seed=seed + 1).mul(2).exp()


@pytest.mark.parametrize("num_centers", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("kind", ["gaussian", "heavy", "shared"])
def test_within_a_percent_of_the_optimum(num_centers: int, kind: str) -> None:
    values, weights = heavy(3, 60, seed=num_centers)
    if kind == "gaussian":
        values = gaussian(3, 60, seed=num_centers)
    if kind == "shared":
        weights = weights[:1]
    centers = weighted_kmeans(values, weights, num_centers)
    assert centers.shape == (3, num_centers)
    assert centers.dtype == torch.float32
    assert bool((centers.diff(dim=1) >= 0).all())
    pairs = zip(errors(values, weights, centers), optima(values, weights, num_centers), strict=True)
    for found, least in pairs:
        assert least * (1 - 1e-5) - 1e-9 <= found <= 1.01 * least + 1e-9


def test_longer_rows_need_bins_and_are_close_too() -> None:
    values, weights = heavy(1, 160, seed=5)
    centers = weighted_kmeans(values, weights, 8)
    for found, least in zip(errors(values, weights, centers), optima(values, weights, 8), strict=True):
        assert found <= 1.02 * least


def test_it_is_better_than_lloyd_from_quantiles() -> None:
    values, weights = gaussian(16, 576, seed=1), gaussian(1, 576, seed=2).exp()
    centers = values.sort(1).values[:, 18::36].contiguous()
    for _ in range(100):
        middles = (centers[:, 1:] + centers[:, :-1]) / 2
        member = torch.nn.functional.one_hot(torch.searchsorted(middles, values), 16) * weights.unsqueeze(2)
        centers = (member * values.unsqueeze(2)).sum(1) / member.sum(1)
    ours = weighted_kmeans(values, weights, 16)
    assert sum(errors(values, weights, ours)) < 0.8 * sum(errors(values, weights, centers))


def test_values_without_weight_do_not_matter() -> None:
    values, weights = heavy(4, 50)
    weights[:, ::3] = 0
    moved = values.clone()
    moved[:, ::3] = 100 * gaussian(4, 17, seed=9)
    kept = torch.arange(50) % 3 > 0
    centers = weighted_kmeans(moved, weights, 4)
    for found, least in zip(
        errors(values[:, kept], weights[:, kept], centers), optima(values[:, kept], weights[:, kept], 4), strict=True
    ):
        assert found <= 1.02 * least


def test_a_row_without_any_weight_counts_all_its_values_alike() -> None:
    values = gaussian(2, 40)
    weights = torch.ones(2, 40)
    weights[1] = 0
    assert torch.equal(weighted_kmeans(values, weights, 4), weighted_kmeans(values, torch.ones(1, 40), 4))


@pytest.mark.parametrize("num_centers", [8, 256])
def test_more_centers_than_values_lose_nothing(num_centers: int) -> None:
    values = torch.tensor([[3.0, -1.0, 2.0, 2.0, -1.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    centers = weighted_kmeans(values, torch.ones(1, 5), num_centers)
    assert bool((centers.diff(dim=1) >= 0).all())
    assert sum(errors(values, torch.ones(1, 5), centers)) < 1e-12


@pytest.mark.parametrize("size", [1e-30, 1e-4, 1e30])
def test_size_does_not_matter(size: float) -> None:
    values, weights = heavy(3, 60)
    torch.testing.assert_close(
        weighted_kmeans(values * size, weights, 4) / size, weighted_kmeans(values, weights, 4), rtol=1e-5, atol=0
    )
    torch.testing.assert_close(weighted_kmeans(values, weights * size, 4), weighted_kmeans(values, weights, 4))


def test_rows_do_not_depend_on_how_they_are_split() -> None:
    values, weights = heavy(600, 200)
    whole = weighted_kmeans(values, weights, 16)
    parts = [weighted_kmeans(v, w, 16) for v, w in zip(values.split(77), weights.split(77), strict=True)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    values, weights = heavy(2, 8)
    for wrong in (
        (values.index_fill(1, torch.tensor(3), bad), weights),
        (values, weights.index_fill(1, torch.tensor(3), bad)),
    ):
        with pytest.raises(ValueError, match="NaN or infinite"):
            weighted_kmeans(*wrong, 2)

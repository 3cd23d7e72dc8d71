"""The best low-rank approximation against explicit float64 SVDs."""

import pytest
import torch

from decoct.ops.low_rank import whitened_low_rank
from tests.reference import low_rank as reference
from tests.reference.inputs import correlated, gaussian, hessian

SHAPES = [(12, 20), (20, 12), (16, 16), (1, 8), (8, 1)]


@pytest.mark.parametrize("shape", SHAPES)
def test_as_good_as_svd_llm_and_as_eora(shape: tuple[int, int]) -> None:
    w, gram = gaussian(*shape, seed=1), hessian(correlated(64, shape[1]))
    for rank in {1, min(shape) // 2, min(shape)} - {0}:
        A, B = whitened_low_rank(w, gram, rank)
        assert (A.shape, B.shape) == ((shape[0], rank), (rank, shape[1]))
        assert A.dtype == B.dtype == torch.float32
        product = A.double() @ B.double()
        floor = 1e-5 * reference.error(w, gram)
        for best, least in (reference.svd_llm(w, gram, rank), reference.eora(w, gram, rank)):
            assert reference.error(w - product, gram) <= least * (1 + 1e-4) + floor
            assert reference.error(best - product, gram) <= 1e-3 * least + floor


@pytest.mark.parametrize("shape", SHAPES)
def test_without_a_gram_it_is_the_truncated_svd(shape: tuple[int, int]) -> None:
    w, rank = gaussian(*shape, seed=2), max(1, min(shape) // 3)
    A, B = whitened_low_rank(w, None, rank)
    U, sigma, Vt = torch.linalg.svd(w.double(), full_matrices=False)
    torch.testing.assert_close((A @ B).double(), (U[:, :rank] * sigma[:rank]) @ Vt[:rank], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_singular_values_are_shared_evenly(shape: tuple[int, int]) -> None:
    w, gram = gaussian(*shape, seed=1), hessian(correlated(64, shape[1]))
    A, B = whitened_low_rank(w, gram, 4)
    sigma = torch.linalg.svdvals(w.double() @ torch.linalg.cholesky(gram))[:4]
    for gathered in ((A.T @ A).double(), B.double() @ gram @ B.T.double()):  # each up to a common factor
        torch.testing.assert_close(gathered / gathered.trace(), (sigma / sigma.sum()).diag(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_degenerate_inputs_give_finite_factors(shape: tuple[int, int]) -> None:
    few = hessian(correlated(3, shape[1]))  # fewer tokens than features
    dead = hessian(correlated(64, shape[1]) * (torch.arange(shape[1]) % 2))
    for w in (gaussian(*shape), torch.zeros(shape), torch.ones(shape)):
        for gram in (few, dead, None):
            A, B = whitened_low_rank(w, gram, 6)
            assert torch.isfinite(A).all()
            assert torch.isfinite(B).all()
            if gram is not None:
                _, least = reference.svd_llm(w, gram + 1e-9 * torch.eye(shape[1]), 6)
                assert reference.error(w - (A @ B).double(), gram) <= least * 1.01 + 1e-3 * reference.error(w, gram)


@pytest.mark.parametrize("size", [1e-20, 1e-3, 1e3, 1e20])
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_the_scale_of_the_gram_does_not_matter(shape: tuple[int, int], size: float) -> None:
    w, gram = gaussian(*shape, seed=1), hessian(correlated(64, shape[1]))
    A, B = whitened_low_rank(w, gram, 4)
    scaled_A, scaled_B = whitened_low_rank(w, gram * size, 4)
    torch.testing.assert_close(scaled_A @ scaled_B, A @ B, rtol=1e-3, atol=1e-4)


def test_inputs_that_were_all_zero_give_finite_factors() -> None:
    for shape in SHAPES[:3]:
        A, B = whitened_low_rank(gaussian(*shape), torch.zeros(shape[1], shape[1]), 4)
        assert torch.isfinite(A @ B).all()


def test_statistics_that_are_not_finite_are_refused() -> None:
    gram = hessian(correlated(64, 8))
    gram[2, 2] = float("nan")
    with pytest.raises(ValueError, match="input statistics"):
        whitened_low_rank(gaussian(8, 8), gram, 2)


@pytest.mark.parametrize("shape", SHAPES[:3])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(bad: float, shape: tuple[int, int]) -> None:
    w = gaussian(*shape)
    w[1, 1] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        whitened_low_rank(w, hessian(correlated(64, shape[1])), 2)

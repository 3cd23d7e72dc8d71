"""Additive codebooks: decoding, searches and fits against loops over all combinations."""

from collections.abc import Iterator

import pytest
import torch

from decoct.ops.additive import (
    NearestSums,
    collect,
    decode,
    feedback_codes,
    fit_codebooks,
    fit_rows,
    improve_codes,
    least,
)
from decoct.ops.linalg import inverse_factor
from decoct.ops.residual_kmeans import nearest_centers, residual_kmeans
from tests.reference import additive as reference
from tests.reference.inputs import correlated, gaussian, hessian


def random_codes(books: int, rows: int, n: int, entries: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, entries, (books, rows, n), generator=generator).to(torch.uint8)


def gram(width: int) -> torch.Tensor:
    H = hessian(correlated(20 * width, width)).float()
    return H / H.diagonal().mean() + 0.01 * torch.eye(width)


@pytest.fixture
def both_thread_counts() -> Iterator[tuple[int, int]]:
    before = torch.get_num_threads()
    yield 1, 2
    torch.set_num_threads(before)


def test_decode_adds_entries_and_collect_is_its_transpose() -> None:
    codes, codebooks = random_codes(3, 5, 4, 16), gaussian(3, 16, 2, seed=1)
    expected = reference.decoded(codes.permute(1, 2, 0).tolist(), codebooks.double())
    torch.testing.assert_close(decode(codes, codebooks).double(), expected, rtol=0, atol=1e-6)
    g = gaussian(5, 8, seed=2)
    assert float((decode(codes, codebooks) * g).sum()) == pytest.approx(
        float((codebooks * collect(codes, g, 16)).sum()), rel=1e-5
    )


def test_least_is_argmin() -> None:
    values = gaussian(50, 37, 3).square()
    assert torch.equal(least(values.clone()), values.argmin(1))
    assert least(torch.full((1, 5, 1), 7.0)).tolist() == [[0]]


@pytest.mark.parametrize(("books", "entries", "d"), [(1, 16, 3), (2, 16, 4), (3, 8, 2)])
def test_with_a_full_beam_the_nearest_sum_is_found(books: int, entries: int, d: int) -> None:
    codebooks, wanted = gaussian(books, entries, d, seed=1), 1.5 * gaussian(60, d, seed=2)
    found = NearestSums(codebooks, entries).find(wanted)
    exact = 0
    for vector, codes in zip(wanted, found.T.tolist(), strict=True):
        exact += tuple(codes) == reference.best_sum(vector, codebooks)
    assert exact >= (60 if books < 3 else 40)  # with three codebooks a beam cannot keep everything


def test_a_wider_beam_loses_less_and_current_codes_are_never_left_for_worse() -> None:
    codebooks, wanted = gaussian(2, 64, 8, seed=1), 1.5 * gaussian(500, 8, seed=2)

    def lost(codes: torch.Tensor) -> torch.Tensor:
        return (wanted - decode(codes.unsqueeze(2), codebooks)).square().sum(1)

    means = [float(lost(NearestSums(codebooks, beam).find(wanted)).mean()) for beam in (1, 4, 16, 64)]
    assert means == sorted(means, reverse=True)
    assert means[-1] < 0.95 * means[0]
    good = NearestSums(codebooks, 64).find(wanted)
    again = NearestSums(codebooks, 1).find(wanted, good)
    assert (lost(again) <= lost(good) + 1e-4).all()


def test_descent_ends_near_the_best_of_all_codes() -> None:
    """Three vectors of two codes out of three entries: 729 ways for a row."""
    w, codebooks, H = gaussian(6, 6, seed=1), gaussian(2, 4, 2, seed=2)[:, :3], gram(6)
    codebooks = torch.cat([codebooks, torch.full((2, 1, 2), 1e3)], 1)  # a power of two, the last never chosen
    upper = inverse_factor(H, 1e-6).upper
    first = feedback_codes(w, upper, codebooks, 4)
    codes = first
    for _ in range(3):
        codes = improve_codes(w, codes, codebooks, H, 4)
    best = sum(reference.best_codes_of_row(row, codebooks[:, :3], H) for row in w)
    lost = [reference.loss(w, decode(c, codebooks), H) for c in (first, codes)]
    assert best - 1e-3 <= lost[1] <= lost[0] + 1e-3
    assert lost[1] < 1.25 * best


def test_every_sweep_lowers_every_rows_error() -> None:
    w, codebooks, H = gaussian(300, 40, seed=1), gaussian(2, 16, 4, seed=2), gram(40)
    codes = random_codes(2, 300, 10, 16)
    before = None
    for _ in range(3):
        lost = w - decode(codes, codebooks)
        errors = ((lost @ H) * lost).sum(1)
        if before is not None:
            assert (errors <= before * (1 + 1e-4)).all()
        before, codes = errors, improve_codes(w, codes, codebooks, H, 4)


def test_feedback_pays() -> None:
    w, codebooks, H = gaussian(64, 48, seed=1), 0.7 * gaussian(2, 32, 4, seed=2), gram(48)
    plain = NearestSums(codebooks, 8).find(w.reshape(-1, 4)).reshape(2, 64, 12)
    fed_back = feedback_codes(w, inverse_factor(H, 1e-6).upper, codebooks, 8)
    losses = [reference.loss(w, decode(codes, codebooks), H) for codes in (fed_back, plain)]
    assert losses[0] < 0.8 * losses[1]


def test_codebooks_reach_the_least_squares_solution() -> None:
    w, H, codes = gaussian(30, 12, seed=1), gram(12), random_codes(2, 30, 4, 8)
    weight = gaussian(30, 1, seed=3).square()
    best = reference.best_codebooks(w, codes, 8, 3, H, weight)
    losses = []
    for steps in (0, 2, 10, 200):
        found = decode(codes, fit_codebooks(w, codes, torch.zeros(2, 8, 3), H, weight, steps))
        losses.append(reference.loss(w * weight.sqrt(), found * weight.sqrt(), H))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == pytest.approx(best, rel=1e-3)


def test_entries_that_no_vector_uses_stay() -> None:
    codes = torch.zeros(1, 5, 2, dtype=torch.uint8)
    first = gaussian(1, 4, 3)
    found = fit_codebooks(gaussian(5, 6, seed=1), codes, first, gram(6), torch.ones(5, 1), 5)
    assert torch.equal(found[:, 1:], first[:, 1:])
    assert torch.isfinite(found).all()


def test_row_factors_are_least_squares() -> None:
    w, found, H = gaussian(7, 6, seed=1).double(), gaussian(7, 6, seed=2).double(), gram(6).double()
    found[3] = 0
    factor = fit_rows(w, found, H)
    assert float(factor[3]) == 1
    lost = w - factor * found
    slope = ((lost @ H) * found).sum(1)
    torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-9)


def test_k_means_lowers_its_error_and_keeps_rare_large_vectors() -> None:
    vectors, weights = gaussian(400, 3, seed=1), gaussian(400, 3, seed=2).square()
    vectors[7] = torch.tensor([80.0, -90.0, 70.0])
    errors = []
    for steps in (0, 1, 4, 20):
        generator = torch.Generator().manual_seed(0)
        (book,) = residual_kmeans(vectors, weights, (1, 16), num_steps=steps, generator=generator)
        chosen = nearest_centers(vectors, weights, book)
        by_hand = [
            min(range(16), key=lambda k, i=i: float((weights[i] * (vectors[i] - book[k]) ** 2).sum())) for i in (0, 7)
        ]
        assert chosen[[0, 7]].tolist() == by_hand
        errors.append(float((weights * (vectors - book[chosen]).square()).sum()))
        torch.testing.assert_close(book[chosen[7]], vectors[7])
    assert errors == sorted(errors, reverse=True)


def test_k_means_with_fewer_vectors_than_entries() -> None:
    vectors = gaussian(3, 2)
    books = residual_kmeans(vectors, torch.ones(3, 2), (2, 8), num_steps=2, generator=torch.Generator().manual_seed(0))
    assert books.shape == (2, 8, 2)
    torch.testing.assert_close(books[0][nearest_centers(vectors, torch.ones(3, 2), books[0])], vectors)


def test_threads_do_not_change_codes(both_thread_counts: tuple[int, int]) -> None:
    codebooks, wanted = gaussian(2, 64, 8, seed=1), gaussian(1500, 8, seed=2)
    found = []
    for threads in both_thread_counts:
        torch.set_num_threads(threads)
        found.append(NearestSums(codebooks, 8).find(wanted))
    assert torch.equal(*found)

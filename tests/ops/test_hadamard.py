"""Hadamard matrices of every order that is built, the fast transform, and signs."""

import math

import pytest
import torch

from decoct.ops.hadamard import hadamard, hadamard_matrix, random_signs, rotate, rotate_back, transform_factors
from tests.reference.inputs import gaussian

WIDTHS = [1, 2, 4, 12, 20, 24, 28, 36, 52, 64, 100, 108, 140, 192, 344, 576, 768, 896, 1536, 4864]  # all have matrices
OTHERS = [3, 5, 6, 7, 13, 18, 43, 92, 172, 2 * 107]  # have none here


@pytest.mark.parametrize("order", [1, 2, *range(4, 420, 4)])
def test_rows_are_orthogonal_signs(order: int) -> None:
    if transform_factors(order)[0] > 1:
        with pytest.raises(ValueError, match=f"no Hadamard matrix of order {order} is known here"):
            hadamard_matrix(order)
        return
    matrix = hadamard_matrix(order)
    assert torch.equal(matrix.abs(), torch.ones(order, order, dtype=torch.float64))
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize("width", [
    576, 896, 960, 1152, 1536, 2048, 2304, 2560, 3072, 3584, 4096, 4864, 5120, 5632,
    6144, 6912, 8192, 8960, 9216, 9728, 11008, 12288, 13824, 14336, 16384, 18944, 21504, 24576,
    27648, 28672, 29568, 36864, 49152, 53248,
])  # fmt: skip
def test_the_widths_of_common_models_have_true_hadamard_transforms(width: int) -> None:
    odd, order, power = transform_factors(width)
    assert odd == 1
    assert order << power == width


@pytest.mark.parametrize("width", WIDTHS + OTHERS)
def test_the_fast_transform_is_the_matrix(width: int) -> None:
    x = gaussian(3, 2, width, dtype=torch.float64)
    if width in WIDTHS:
        matrix = hadamard_matrix(width) / math.sqrt(width)
    else:
        odd, _, power = transform_factors(width)
        angles = torch.arange(odd, dtype=torch.float64)[:, None] * torch.arange(odd) * (2 * math.pi / odd)
        matrix = torch.kron(
            (angles.cos() + angles.sin()) / math.sqrt(odd), hadamard_matrix(1 << power) / 2 ** (power / 2)
        )
    torch.testing.assert_close(hadamard(x), x @ matrix.T, rtol=0, atol=1e-11)
    torch.testing.assert_close(hadamard(x, inverse=True), x @ matrix, rtol=0, atol=1e-11)
    assert float(matrix.abs().max()) <= math.sqrt(2 / width) + 1e-12


@pytest.mark.parametrize("width", WIDTHS + OTHERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lengths_are_kept_and_it_can_be_undone(width: int, dtype: torch.dtype) -> None:
    x = gaussian(4, width, dtype=dtype)
    y = hadamard(x)
    assert y.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(y.norm(dim=1), x.norm(dim=1), rtol=tolerance, atol=0)
    torch.testing.assert_close(hadamard(y, inverse=True), x, rtol=0, atol=10 * tolerance)


def test_rotating_a_matrix_and_back() -> None:
    w = gaussian(24, 20, dtype=torch.float64)
    left, right = hadamard_matrix(24) / math.sqrt(24), hadamard_matrix(20) / math.sqrt(20)
    torch.testing.assert_close(rotate(w), left @ w @ right.T)
    torch.testing.assert_close(rotate_back(w), left.T @ w @ right)


def test_a_single_entry_is_spread_over_all() -> None:
    w = torch.zeros(36, 576)
    w[3, 100] = 1.0
    torch.testing.assert_close(rotate(w).abs(), torch.full((36, 576), 1 / math.sqrt(36 * 576)))


def test_signs_are_those_of_the_seed() -> None:
    signs = random_signs(4096, 7)
    assert torch.equal(signs.abs(), torch.ones(4096))
    assert torch.equal(signs[:100], random_signs(100, 7))
    assert abs(float(signs.mean())) < 0.06
    assert abs(float((signs[1:] * signs[:-1]).mean())) < 0.06
    assert abs(float((signs * random_signs(4096, 8)).mean())) < 0.06
    assert signs[:500].tolist() == [-1.0 if mixed(number, 7) & 1 else 1.0 for number in range(1, 501)]


def mixed(number: int, seed: int) -> int:
    """Murmur3's finalizer in Python's integers."""
    h = (number * 0x9E3779B1 + seed * 0x7FEB352D) % 2**32
    h = (h ^ h >> 16) * 0x85EBCA6B % 2**32
    h = (h ^ h >> 13) * 0xC2B2AE35 % 2**32
    return h ^ h >> 16


def test_a_length_must_be_positive() -> None:
    with pytest.raises(ValueError, match="positive length"):
        transform_factors(0)

"""Hadamard transforms of any length, and random signs: rotations that spread what is concentrated in a few entries.

A Hadamard matrix has entries ±1 and orthogonal rows. Those of order 2**a are Sylvester's; for m = q + 1 or 2·(q + 1)
with q a power of an odd prime there are Paley's (1933); products of both, by Kronecker, serve nearly every width that
language models have: 576 = 36·16, 1536 = 12·128, 11008 = 344·32. Where m has no construction here (odd lengths, say),
its odd part is transformed by the discrete Hartley transform, cos + sin of the Fourier angles: orthogonal as well, with
entries of at most √2 times the size.
"""

import math
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

_LARGEST_PALEY = 1024  # larger dense factors would cost more than they gain
_BUTTERFLY = 7  # powers of two are transformed 2**7 at a time, by matrix products


def hadamard(x: Float[Tensor, "*shape"], *, inverse: bool = False, dim: int = -1) -> Float[Tensor, "*shape"]:
    """The orthonormal transform along an axis: y = H·x/√n, or back again.

    Args:
        x: float32 or float64; any length.
        inverse: multiply by the transpose.
        dim: the axis.
    """
    n, inner = x.shape[dim], math.prod(x.shape[dim:][1:])
    odd, order, power = transform_factors(n)
    y = _sylvester(x, power, inner) if power else x
    if order > 1:
        base = _orthonormal(order, x.dtype).to(x.device)
        y = (base.T if inverse else base) @ y.reshape(-1, order, inner << power)
    elif odd > 1:
        spectrum = torch.fft.fft(y.reshape(-1, odd, inner << power), dim=-2, norm="ortho")
        y = spectrum.real - spectrum.imag  # its own inverse
    return y.reshape(x.shape)


def rotate(matrix: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """H · matrix · Hᵀ, with the orthonormal transforms of both lengths: what `rotate_back` undoes."""
    return hadamard(hadamard(matrix), dim=0)


def rotate_back(matrix: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """Hᵀ · matrix · H."""
    return hadamard(hadamard(matrix, inverse=True, dim=0), inverse=True)


def transform_factors(n: int) -> tuple[int, int, int]:
    """How length n is split: (Hartley length, order of a Paley matrix, a) with n = their product times 2**a.

    One of the first two is 1. So the transform is a true Hadamard transform if the first is 1.

    Raises:
        ValueError: n is not positive.
    """
    if n < 1:
        raise ValueError(f"a transform needs a positive length, not {n}")
    power = (n & -n).bit_length() - 1
    odd = n >> power
    if odd == 1:
        return 1, 1, power
    for twos in range(2, power + 1):
        order = odd << twos
        if order <= _LARGEST_PALEY and _paley_field(order) is not None:
            return 1, order, power - twos
    return odd, 1, power


def hadamard_matrix(n: int) -> Float[Tensor, "n n"]:
    """A Hadamard matrix of order n, entries ±1, float64.

    Raises:
        ValueError: none is known here; says which lengths are.
    """
    odd, order, power = transform_factors(n)
    if odd > 1:
        raise ValueError(f"no Hadamard matrix of order {n} is known here; orders are 2**a times 1, q + 1 or 2·(q + 1)")
    matrix = _paley(order) if order > 1 else torch.ones(1, 1, dtype=torch.float64)
    for _ in range(power):
        matrix = torch.kron(matrix, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64))
    return matrix


def random_signs(n: int, seed: int) -> Float[Tensor, " n"]:
    """±1, float32, the same for the same seed on every machine (murmur3's finalizer of a counter)."""
    mask = (1 << 32) - 1
    mixed = (torch.arange(1, n + 1) * 0x9E3779B1 + seed * 0x7FEB352D) & mask
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        mixed = ((mixed ^ (mixed >> shift)) * factor) & mask
    return 1.0 - 2.0 * (mixed & 1).float()


def _sylvester(x: Tensor, power: int, inner: int) -> Tensor:
    """Transform 2**power entries that lie `inner` apart, some of their index's bits at a time."""
    done = 0
    while done < power:
        bits = min(_BUTTERFLY, power - done)
        factor, step = _orthonormal(1 << bits, x.dtype).to(x.device), inner << done
        x = x.reshape(-1, 1 << bits) @ factor if step == 1 else factor @ x.reshape(-1, 1 << bits, step)
        done += bits
    return x


@cache
def _orthonormal(n: int, dtype: torch.dtype) -> Float[Tensor, "n n"]:
    return (hadamard_matrix(n) / math.sqrt(n)).to(dtype)


def _paley_field(order: int) -> tuple[int, int, bool] | None:
    """(p, k, doubled) with order = (p**k + 1)·(2 if doubled else 1), for the constructions I and II; None: neither."""
    for doubled in (False, True):
        q = (order // 2 if doubled else order) - 1
        if q < 3 or order % 4 or q % 4 != (1 if doubled else 3):
            continue
        p = next((d for d in range(3, math.isqrt(q) + 1, 2) if q % d == 0), q)
        k = round(math.log(q, p))
        if p**k == q:
            return p, k, doubled
    return None


@cache
def _paley(order: int) -> Float[Tensor, "order order"]:
    field = _paley_field(order)
    assert field is not None
    p, k, doubled = field
    q = p**k
    # The Jacobsthal matrix: 1 where the difference of two field elements is a square, -1 where it is not, 0 for none.
    jacobsthal = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    jacobsthal[0, 1:] = 1
    jacobsthal[1:, 0] = 1 if doubled else -1
    digits = torch.stack([torch.arange(q) // p**place % p for place in range(k)], -1)
    differences = ((digits[:, None] - digits[None, :]) % p * torch.tensor([p**place for place in range(k)])).sum(-1)
    jacobsthal[1:, 1:] = _quadratic_character(p, k)[differences]
    eye = torch.eye(q + 1, dtype=torch.float64)
    if not doubled:
        return jacobsthal + eye
    plus, minus = (torch.tensor(m, dtype=torch.float64) for m in ([[1, 1], [1, -1]], [[1, -1], [-1, -1]]))
    return torch.kron(jacobsthal, plus) + torch.kron(eye, minus)


def _quadratic_character(p: int, k: int) -> Float[Tensor, " q"]:
    """For each element of the field of p**k elements 0 (zero), 1 (a square) or -1; digits in base p are coefficients.

    Every even power of a primitive element is a square and every odd one is not. So look for a monic polynomial of
    degree k such that the powers of its root x meet every element but zero.
    """
    q = p**k
    for candidate in range(q):
        tail = [candidate // p**place % p for place in range(k)]  # x**k = tail, lowest coefficient first
        character = torch.zeros(q, dtype=torch.float64)
        element, sign = [1] + [0] * (k - 1), 1.0
        for _ in range(q - 1):
            number = sum(c * p**place for place, c in enumerate(element))
            if number == 0 or character[number] != 0:
                break
            character[number] = sign
            top, sign = element[-1], -sign
            element = [(c + top * t) % p for c, t in zip([0, *element[:-1]], tail, strict=True)]
        else:
            return character
    raise AssertionError(f"the field of {q} elements has a primitive element")

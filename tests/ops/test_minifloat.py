"""Small floats against their definition, and E4M3 against torch's own."""

import itertools
import math

import pytest
import torch

from decoct.ops.minifloat import ELEMENTS, decode, encode, exponent_of, power_of_two, rounded
from tests.reference import minifloat as reference
from tests.reference.inputs import gaussian

EVERY = pytest.mark.parametrize("name", ELEMENTS)


def codes_of(name: str) -> torch.Tensor:
    return torch.arange(2 ** ELEMENTS[name].bits).to(torch.uint8)


def numbers(name: str) -> list[float]:
    return [reference.number(code, name) for code in range(2 ** ELEMENTS[name].bits)]


@EVERY
def test_every_code_stands_for_the_number_that_the_specification_gives(name: str) -> None:
    found, expected = decode(codes_of(name), ELEMENTS[name]).double(), torch.tensor(numbers(name), dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(
        torch.signbit(found), torch.signbit(expected) | (codes_of(name) >> (ELEMENTS[name].bits - 1) == 1)
    )
    assert ELEMENTS[name].largest == reference.LARGEST[name]
    assert ELEMENTS[name].highest == reference.HIGHEST_EXPONENT[name]
    assert ELEMENTS[name].bits == 1 + sum(reference.LAYOUT[name])


@EVERY
def test_numbers_of_the_format_and_ties_between_them(name: str) -> None:
    kind = ELEMENTS[name]
    exact = sorted(v for v in set(numbers(name)) if not math.isnan(v))
    between = [(a + b) / 2 for a, b in itertools.pairwise(exact)]
    values = torch.tensor([*exact, *between, 1e30, -1e30, kind.largest * 1.001, 1e-30, -1e-30, 1e-42, 0.0, -0.0])
    codes = encode(values, kind)
    assert codes.tolist() == [reference.nearest(v, name) for v in values.tolist()]
    assert torch.equal(decode(codes, kind), rounded(values, kind))


@EVERY
@pytest.mark.parametrize("size", [0.03, 1.0, 40.0])
def test_random_numbers(name: str, size: float) -> None:
    x = gaussian(40, 25, seed=3) * gaussian(40, 1, seed=4).exp() * size
    codes = encode(x, ELEMENTS[name])
    assert codes.dtype == torch.uint8
    assert codes.flatten().tolist() == [reference.nearest(v, name) for v in x.flatten().tolist()]
    assert torch.equal(decode(codes, ELEMENTS[name]), rounded(x, ELEMENTS[name]))


def test_e4m3_is_torchs() -> None:
    x = gaussian(300, 300) * gaussian(300, 1, seed=1).exp() * 20
    theirs = x.clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(encode(x, ELEMENTS["e4m3"]), theirs.view(torch.uint8))
    assert torch.equal(rounded(x, ELEMENTS["e4m3"]), theirs.float())


def test_powers_of_two_are_exact() -> None:
    exponents = torch.arange(-126, 128, dtype=torch.int32)
    powers = power_of_two(exponents)
    assert powers.double().tolist() == [2.0**e for e in range(-126, 128)]
    for factor in (1.0, 1.5, 2 - 2**-23):
        assert torch.equal(exponent_of(powers * factor), exponents)

"""Every product agrees with the matrix that its weight unpacks to, in float64."""

import subprocess
import sys
import threading

import pytest
import torch

from decoct.ops.grid import Grid
from decoct.runtime import kernels
from decoct.runtime.kernels.compiled import Compiled
from decoct.runtime.kernels.library import library
from decoct.weights import Codebook, Dense, GroupInt, Weight
from tests.weights.samples import samples

FOUND = library()
LEVELS = FOUND.levels if FOUND else ()
needs_library = pytest.mark.skipif(FOUND is None, reason="decoct was installed without its compiled kernels")
SHAPES = [(1, 8), (5, 24), (16, 32), (33, 40), (37, 168), (64, 256)]


def inputs(rows: int, cols: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)).to(dtype)


def integers(bits: int, shape: tuple[int, int], group_size: int, form: str, seed: int = 0) -> GroupInt:
    """Random codes, scales and zero points."""
    out, cols = shape
    generator = torch.Generator().manual_seed(seed)
    groups = cols // group_size
    scale = torch.rand(out, groups, generator=generator).add(0.1).to(torch.bfloat16 if form == "symmetric" else torch.half)
    zero = None
    if form == "integer":
        zero = torch.randint(2**bits, (out, groups), generator=generator, dtype=torch.uint8)
    elif form == "real":
        zero = (torch.rand(out, groups, generator=generator) * 2**bits).half()
    codes = torch.randint(2**bits, shape, generator=generator, dtype=torch.uint8)
    return GroupInt.of(codes, Grid(scale, zero, bits, group_size), torch.float32)


def agrees(product: kernels.Product, weight: Weight, x: torch.Tensor) -> None:
    """Within what float32 sums may lose, against float64."""
    exact = x.double() @ weight.unpack(torch.float32).double().T
    size = x.double().abs() @ weight.unpack(torch.float32).double().abs().T
    found = product(x)
    assert found.dtype == x.dtype
    assert found.shape == exact.shape
    step = torch.finfo(x.dtype).eps
    assert ((found.double() - exact).abs() <= 4e-6 * size + step * exact.abs() + 1e-30).all()


@pytest.mark.parametrize("kind", sorted(samples()))
def test_every_kind_of_weight(kind: str) -> None:
    weight = samples()[kind]
    product = kernels.linear(weight)
    assert product.shape == weight.shape
    x = inputs(6, weight.shape[1]).reshape(2, 3, -1)
    assert torch.allclose(product(x), weight.apply(x), rtol=1e-4, atol=1e-4)
    assert torch.equal(product.unpack(torch.float32), weight.unpack(torch.float32))
    ids = torch.tensor([[0, 2], [1, 0]]) % weight.shape[0]
    assert torch.equal(product.rows(ids), weight.unpack_rows(ids))


@needs_library
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("form", ["symmetric", "integer", "real"])
def test_integers(bits: int, form: str, level: str) -> None:
    for shape in SHAPES:
        for group_size in {8, 24, 32, 64, shape[1]}:
            if shape[1] % group_size:
                continue
            weight = integers(bits, shape, group_size, form)
            product = kernels.linear(weight)
            assert isinstance(product, Compiled), product.kernel
            product.at_level(level)
            for rows in (1, 3, 9):
                agrees(product, weight, inputs(rows, shape[1]))
            assert torch.equal(product.unpack(), weight.unpack())

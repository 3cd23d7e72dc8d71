"""Rounding to small floats: sizes, structure, what the search wins."""

import pytest
import torch

from decoct.methods.quantize.mxfp import MXFP
from decoct.weights import Dense, FloatBlock, LowRank, Masked, Sparse
from tests.reference import minifloat as reference
from tests.reference.inputs import gaussian

ROWS, COLS = 16, 128
FORMATS = {"fp8": 8 + 16 / COLS, "mxfp8": 8.25, "mxfp6": 6.25, "mxfp4": 4.25, "nvfp4": 4.5 + 32 / (ROWS * COLS)}
EVERY = pytest.mark.parametrize("name", FORMATS)


def matrix(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (gaussian(ROWS, COLS) * gaussian(ROWS, 1, seed=1).exp()).to(dtype)


def rounded(method: MXFP, w: torch.Tensor) -> FloatBlock:
    weight = method.compress(Dense.of(w))
    assert isinstance(weight, FloatBlock)
    return weight


@EVERY
def test_bits_per_weight(name: str) -> None:
    weight = rounded(MXFP(format=name), matrix(torch.bfloat16))
    assert weight.bits_per_weight == FORMATS[name]
    assert weight.dtype == torch.bfloat16


def test_mxfp4_without_search_is_the_specifications() -> None:
    w = matrix()
    found = rounded(MXFP(format="mxfp4", search=False), w).unpack()
    expected = [reference.mx_block(block, "e2m1") for block in w.double().reshape(-1, 32).tolist()]
    assert found.double().reshape(-1, 32).tolist() == expected


@pytest.mark.parametrize("name", ["mxfp8", "mxfp6", "mxfp4", "nvfp4"])
def test_the_search_lowers_the_error(name: str) -> None:
    w = matrix()
    errors = [
        float((rounded(MXFP(format=name, search=search), w).unpack() - w).square().sum()) for search in (False, True)
    ]
    assert errors[1] < {"mxfp8": 1.0, "mxfp6": 1.0, "mxfp4": 0.95, "nvfp4": 0.9}[name] * errors[0]


def test_more_bits_and_smaller_blocks_err_less() -> None:
    w = matrix()
    errors = [float((rounded(MXFP(format=name), w).unpack() - w).square().sum()) for name in FORMATS]
    fp8, mxfp8, mxfp6, mxfp4, nvfp4 = errors
    assert max(fp8, mxfp8, mxfp6) < 0.2 * nvfp4  # all three have three bits of mantissa
    assert nvfp4 < 0.8 * mxfp4


@EVERY
def test_masks_and_low_rank_are_kept(name: str) -> None:
    w, kept = matrix(), gaussian(ROWS, COLS, seed=5) > 0
    pruned = MXFP(format=name).compress(Sparse.of(w, kept))
    assert isinstance(pruned, Masked)
    assert torch.equal(pruned.survivors(), kept)
    assert not pruned.unpack()[~kept].any()
    pair = MXFP(format=name).compress(LowRank.of(Dense.of(gaussian(24, 32)), Dense.of(gaussian(32, 64))))
    assert isinstance(pair, LowRank)
    assert [child.kind for child in pair.children().values()] == ["FloatBlock", "FloatBlock"]


def test_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="format must be one of fp8, mxfp8, mxfp6, mxfp4, nvfp4, not 'fp4'"):
        MXFP(format="fp4")
    with pytest.raises(ValueError, match="group_size 32 does not divide 48 input features"):
        MXFP(format="mxfp4").check((8, 48))
    MXFP(format="nvfp4").check((8, 48))
    MXFP(format="fp8").check((8, 47))
    with pytest.raises(ValueError, match="mxfp cannot be applied to a FloatBlock weight"):
        MXFP().compress(rounded(MXFP(), matrix()))

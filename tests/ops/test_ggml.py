"""llama.cpp's tensor types: bytes as the gguf package reads them, and fits that find what is on the grid already."""

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st

from decoct.ops.ggml_blocks import BLOCKS, CODE_BITS, pack_block32, pack_trits, row_bytes
from decoct.ops.ggml_fit import FITTED, round_to

Kind = gguf.GGMLQuantizationType


def read(kind: str, packed: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    assert packed.shape == (shape[0], row_bytes(kind, shape[1]))
    return torch.from_numpy(dequantize(packed.numpy(), Kind[kind])).reshape(shape)


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.02


def test_blocks_have_the_sizes_that_the_format_says() -> None:
    for kind, sizes in BLOCKS.items():
        assert gguf.GGML_QUANT_SIZES[Kind[kind]] == sizes


@settings(max_examples=30, deadline=None)
@given(kind=st.sampled_from(sorted(CODE_BITS)), seed=st.integers(0, 1000), blocks=st.integers(1, 4))
def test_codes_are_read_as_they_were_given(kind: str, seed: int, blocks: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    bits, shape = CODE_BITS[kind], (3, 32 * blocks)
    codes = torch.randint(2**bits, shape, generator=generator, dtype=torch.uint8)
    scale = (torch.rand(3, blocks, generator=generator) + 0.01).half().float()
    minimum = torch.randn(3, blocks, generator=generator).half().float() if kind.endswith("_1") else None
    wide = codes.double().reshape(3, blocks, 32)
    expected = scale.unsqueeze(-1) * (wide - (0 if minimum is not None else 2 ** (bits - 1)))
    expected = (expected if minimum is None else expected + minimum.unsqueeze(-1)).reshape(shape)
    found = read(kind, pack_block32(kind, codes, scale, minimum), shape)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["TQ1_0", "TQ2_0"])
def test_trits_are_read_as_they_were_given(kind: str) -> None:
    trits = torch.randint(-1, 2, (3, 512), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    scale = torch.tensor([[0.5, 2.0]] * 3)
    expected = trits.float() * scale.repeat_interleave(256, 1)
    assert torch.equal(read(kind, pack_trits(kind, trits, scale), (3, 512)), expected)


LATTICES = {"Q4_0": (8, 7), "Q5_0": (16, 15), "Q4_1": (0, 15), "Q5_1": (0, 31), "Q8_0": (127, 127)}


@pytest.mark.parametrize("kind", LATTICES)
def test_what_lies_on_the_grid_is_found_again(kind: str) -> None:
    """A matrix of a calibrated method's codes comes back as it was, whatever codes happen to be used."""
    below, above = LATTICES[kind]
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(-below, above + 1, (16, 128), generator=generator).float()
    codes[:, ::32], codes[:, 1::32] = -below, above
    codes[4:8] = codes[4:8].clamp(-below // 2, above // 2) if below else codes[4:8].clamp(0, above // 2)
    w = codes * (torch.rand(16, 1, generator=generator) * 0.01 + 0.01).half().float()
    error = (read(kind, round_to(kind, w), (16, 128)) - w).norm() / w.norm()
    assert error < 1e-3


WORST = {
    "Q8_0": 5e-5, "Q6_K": 5e-4, "Q5_1": 2e-3, "Q5_0": 2.5e-3, "Q5_K": 2e-3, "Q4_1": 7e-3, "Q4_K": 7e-3, "Q4_0": 9e-3,
    "IQ4_NL": 7e-3, "Q3_K": 0.03, "Q2_K": 0.09, "TQ1_0": 0.25, "TQ2_0": 0.25,
}  # fmt: skip
"""Relative squared errors on a Gaussian matrix: a little above what each type's bits allow."""


@pytest.mark.parametrize("kind", FITTED)
def test_errors_are_those_of_the_bits(kind: str) -> None:
    w = drawn(1, 32, 512)
    found = read(kind, round_to(kind, w), (32, 512))
    assert float((found - w).square().sum() / w.square().sum()) < WORST[kind]


@pytest.mark.parametrize("kind", FITTED)
def test_importance_moves_errors_to_where_they_cost_less(kind: str) -> None:
    w, importance = drawn(2, 32, 512), torch.rand(512, generator=torch.Generator().manual_seed(5)).square() * 9 + 0.01
    plain, weighted = (read(kind, round_to(kind, w, each), (32, 512)) for each in (None, importance))
    cost = [float(((each - w).square() * importance).sum()) for each in (plain, weighted)]
    assert cost[1] < cost[0]


@pytest.mark.parametrize("kind", FITTED)
def test_odd_rows_stay_finite(kind: str) -> None:
    """Zeros, one entry alone, all alike, one sign, and tiny and large values beside each other."""
    w = torch.zeros(6, 256)
    w[1, 17], w[2], w[3] = 3.0, 0.25, drawn(3, 256).abs()
    w[4], w[5] = drawn(4, 256) * 1e-6, -drawn(5, 256).abs() * 100
    found = read(kind, round_to(kind, w), (6, 256))
    assert torch.isfinite(found).all()
    assert bool((found[0] == 0).all())
    assert abs(found[1, 17] - 3) < 0.1
    assert float((found[3] - w[3]).norm() / w[3].norm()) < 0.7


def test_rows_do_not_depend_on_each_other() -> None:
    w = drawn(6, 600, 2048)
    whole = round_to("Q4_K", w)
    assert torch.equal(whole[37:39], round_to("Q4_K", w[37:39]))


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="blocks of 256 entries, which do not divide 64"):
        round_to("Q4_K", drawn(0, 4, 64))
    with pytest.raises(ValueError, match="NaN or infinite"):
        round_to("Q4_0", torch.full((4, 64), np.nan))

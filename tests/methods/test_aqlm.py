"""AQLM: how much it loses, what it stores, and what it refuses."""

from typing import Any

import pytest
import torch

from decoct.methods.guided import ByGroup, Guided
from decoct.methods.quantize.aqlm import AQLM
from decoct.methods.quantize.gptq import GPTQ
from decoct.methods.quantize.rtn import RTN
from decoct.stats import Gram
from decoct.weights import Additive, Dense, LowRank, Masked, Rotated, Sparse, Stacked, Weight
from tests.reference.inputs import correlated, gaussian, heavy, output_error

OUT, IN = 96, 128


def gram(x: torch.Tensor) -> Gram:
    stat = Gram.empty(x.shape[1])
    stat.add(x)
    return stat


def test_less_error_than_gptq_at_the_same_bits() -> None:
    """Codebooks for pairs of weights, since so small a matrix cannot afford those for eight."""
    w, x = gaussian(512, 64, seed=1), correlated(600, 64)
    ours = AQLM(num_codebooks=1, code_bits=4, vector=2).compress(Dense.of(w), gram(x))
    theirs = GPTQ(bits=2, group_size="channel", symmetric=False).compress(Dense.of(w), gram(x))
    assert ours.bits_per_weight < theirs.bits_per_weight
    assert output_error(ours.unpack() - w, x) < 0.8 * output_error(theirs.unpack() - w, x)


def test_rounds_and_a_wider_beam_lose_less() -> None:
    w, x = heavy(OUT, IN), correlated(600, IN)

    def lost(**settings: int) -> float:
        return output_error(AQLM(code_bits=6, **settings).compress(Dense.of(w), gram(x)).unpack() - w, x)

    rounds = [lost(num_rounds=n, beam=8) for n in (0, 1, 4)]
    assert rounds == sorted(rounds, reverse=True)
    assert rounds[-1] < 0.85 * rounds[0]
    assert lost(num_rounds=1, beam=16) < lost(num_rounds=1, beam=1)


@pytest.mark.parametrize(("num_codebooks", "code_bits", "vector"), [(2, 8, 8), (1, 5, 2), (3, 6, 16), (4, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stored_are_codes_codebooks_and_a_scale_for_each_row(
    num_codebooks: int, code_bits: int, vector: int, dtype: torch.dtype
) -> None:
    rows, cols = 256, 64
    method = AQLM(num_codebooks=num_codebooks, code_bits=code_bits, vector=vector, num_rounds=0, beam=1)
    found = method.compress(Dense.of(gaussian(rows, cols).to(dtype)), gram(correlated(600, cols)))
    assert isinstance(found, Additive)
    bits = min(code_bits, 12 - (vector.bit_length() - 1))  # 2^14 weights, four vectors for each entry
    assert found.bits == bits
    row_bytes = -(-cols // vector * bits // 8)
    assert found.codes.nbytes == num_codebooks * rows * row_bytes
    assert found.nbytes == found.codes.nbytes + num_codebooks * 2**bits * vector * 2 + rows * 2


def test_the_seed_decides_where_it_starts() -> None:
    w, stat = gaussian(OUT, IN), gram(correlated(600, IN))
    first, again, other = (AQLM(num_rounds=1, beam=2, seed=s).compress(Dense.of(w), stat).tensors() for s in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["codes"], other["codes"])


def test_threads_do_not_change_the_result() -> None:
    w, stat = gaussian(600, 32), gram(correlated(600, 32))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(AQLM(code_bits=6, num_rounds=1, beam=8).compress(Dense.of(w), stat).tensors())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_any_shape_that_vectors_divide_will_do() -> None:
    for shape, vector in (((1, 8), 8), ((3, 1), 1), ((7, 13), 13), ((43, 22), 2), ((5, 200), 8)):
        w = gaussian(*shape)
        method = AQLM(vector=vector, num_codebooks=3)
        method.check(shape)
        found = method.compress(Dense.of(w), gram(gaussian(200, shape[1])))
        assert float((found.unpack() - w).square().mean()) < w.square().mean()


def test_rows_and_columns_that_are_zero_stay_small() -> None:
    w, x = heavy(OUT, IN), correlated(600, IN)
    w[3] = 0
    x[:, 20] = 0  # no input reaches this column
    w[:, 20] = 1e4
    found = AQLM(code_bits=6).compress(Dense.of(w), gram(x)).unpack()
    assert not found[3].any()
    assert float(found.abs().max()) < 100


def test_both_factors_of_a_product_are_quantized_and_a_rotation_is_kept() -> None:
    left, right = gaussian(OUT, 24, seed=1), gaussian(24, IN, seed=2)
    x = correlated(600, IN)
    product = LowRank.of(Dense.of(left), Dense.of(right))
    found = AQLM(num_codebooks=4, code_bits=5, vector=4).compress(product, gram(x))
    assert isinstance(found, LowRank)
    assert [found.left.kind, found.right.kind] == ["Additive", "Additive"]
    assert output_error(found.unpack() - left @ right, x) < 0.05 * output_error(left @ right, x)
    rotated = Rotated.of(Dense.of(heavy(OUT, IN)), None, torch.ones(IN))
    assert [node.kind for node in AQLM().compress(rotated, gram(x)).walk()] == ["Rotated", "Additive"]


def test_with_guidance_groups_of_rows_have_codebooks_of_their_own() -> None:
    x = correlated(600, IN)
    guided = Guided(method=AQLM(code_bits=4, num_rounds=1, beam=4), groups=3)
    guided.check((OUT, IN))
    stat = ByGroup(Gram, 3).empty(IN)
    stat.add_weighted(x, gaussian(600, 3, seed=4).square())
    found = guided.compress(Dense.of(heavy(OUT, IN)), stat)
    assert isinstance(found, Stacked)
    assert [part.shape for part in found.parts] == [(32, IN)] * 3
    assert output_error(found.unpack() - heavy(OUT, IN), x) < 0.5 * output_error(heavy(OUT, IN), x)


def test_what_it_cannot_keep_is_refused() -> None:
    w, stat = gaussian(OUT, IN), gram(correlated(600, IN))
    kept = gaussian(OUT, IN, seed=2) > 0
    pruned = Sparse.of(w, kept)
    refused: list[Weight] = [
        pruned,
        Masked.of(Dense.of(w * kept), kept),
        LowRank.of(Dense.of(gaussian(8, OUT)), pruned),
    ]
    for weight in refused:
        with pytest.raises(ValueError, match="pruned ones would not stay zero; use gptq"):
            AQLM().compress(weight, stat)
    with pytest.raises(ValueError, match=r"aqlm cannot be applied to a GroupInt weight"):
        AQLM().compress(RTN().compress(Dense.of(w)), stat)
    with pytest.raises(ValueError, match="vector 8 does not divide 172 input features; use 4"):
        AQLM().check((64, 172))
    with pytest.raises(ValueError, match="vector 8 does not divide 12 input features; use 6"):
        AQLM().compress(Dense.of(gaussian(4, 12)), gram(gaussian(50, 12)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_codebooks": 0}, "num_codebooks must be 1 to 8, not 0"),
        ({"code_bits": 9}, "code_bits must be 1 to 8, not 9"),
        ({"vector": 33}, "vector is the number of weights"),
        ({"num_rounds": -1}, "num_rounds must be at least 0"),
        ({"beam": 12}, "beam must be a power of two, 1 to 256, not 12"),
        ({"damping": 0.0}, "damping must be above 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AQLM(**settings)

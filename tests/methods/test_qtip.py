"""QTIP: how much it loses, what it stores, and what it refuses."""

import pytest
import torch

from decoct.methods.quantize.gptq import GPTQ
from decoct.methods.quantize.qtip import QTIP, incoherent_scales
from decoct.methods.quantize.rtn import RTN
from decoct.ops.trellis import expected_error
from decoct.stats import Gram
from decoct.weights import Dense, LowRank, Masked, Rotated, Sparse, Trellis
from tests.reference.inputs import correlated, gaussian, heavy, output_error

OUT, IN = 96, 128


def gram(x: torch.Tensor) -> Gram:
    stat = Gram.empty(x.shape[1])
    stat.add(x)
    return stat


def test_less_error_than_gptq_at_two_bits() -> None:
    w, x = heavy(OUT, IN), gaussian(600, IN)
    ours = QTIP(bits=2).compress(Dense.of(w), gram(x))
    theirs = GPTQ(bits=2, group_size=32).compress(Dense.of(w), gram(x))
    assert ours.bits_per_weight < theirs.bits_per_weight
    assert output_error(ours.unpack() - w, x) < 0.6 * output_error(theirs.unpack() - w, x)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_without_correlation_it_loses_what_the_code_loses(bits: int) -> None:
    w = gaussian(OUT, IN, seed=1)
    found = QTIP(bits=bits).compress(Dense.of(w), Gram.neutral(IN)).unpack()
    error = float((found - w).square().mean() / w.square().mean())
    assert 0.85 * expected_error(bits) < error < 1.1 * expected_error(bits)


def test_more_states_lose_less() -> None:
    w, x = heavy(OUT, IN), correlated(600, IN)
    errors = [output_error(QTIP(state_bits=n).compress(Dense.of(w), gram(x)).unpack() - w, x) for n in (4, 6, 8, 11)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.75 * errors[0]


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stored_are_the_bits_and_a_scale_for_each_row_and_column(bits: int, dtype: torch.dtype) -> None:
    found = QTIP(bits=bits, state_bits=8).compress(Dense.of(gaussian(OUT, IN).to(dtype)), gram(correlated(600, IN)))
    assert isinstance(found, Rotated)
    assert isinstance(found.inner, Trellis)
    assert found.inner.codes.nbytes == OUT * IN * bits // 8
    assert found.nbytes == OUT * IN * bits // 8 + 2 * (OUT + IN) + 2


def test_any_shape_will_do() -> None:
    for shape in ((1, 8), (3, 1), (7, 13), (43, 22)):
        w = gaussian(*shape)
        found = QTIP(bits=4, state_bits=10).compress(Dense.of(w), gram(gaussian(200, shape[1])))
        assert float((found.unpack() - w).square().mean()) < 0.1


def test_both_factors_of_a_product_are_quantized() -> None:
    left, right = gaussian(OUT, 24, seed=1), gaussian(24, IN, seed=2)
    x = correlated(600, IN)
    found = QTIP(bits=4).compress(LowRank.of(Dense.of(left), Dense.of(right)), gram(x))
    assert isinstance(found, LowRank)
    assert [found.left.kind, found.right.kind] == ["Rotated", "Rotated"]
    assert output_error(found.unpack() - left @ right, x) < 0.02 * output_error(left @ right, x)


def test_pruned_and_quantized_matrices_are_refused() -> None:
    w, stat = gaussian(OUT, IN), gram(correlated(600, IN))
    kept = gaussian(OUT, IN, seed=2) > 0
    pruned = Sparse.of(w, kept)
    for weight in (pruned, Masked.of(Dense.of(w * kept), kept), LowRank.of(Dense.of(gaussian(8, OUT)), pruned)):
        with pytest.raises(ValueError, match="pruned ones would not stay zero; use gptq"):
            QTIP().compress(weight, stat)
    with pytest.raises(ValueError, match=r"qtip cannot be applied to a GroupInt weight"):
        QTIP().compress(RTN().compress(Dense.of(w)), stat)


def test_the_seed_decides_the_rotation() -> None:
    w, stat = gaussian(OUT, IN), gram(correlated(600, IN))
    first, again, other = (QTIP(state_bits=8, seed=seed).compress(Dense.of(w), stat).tensors() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["left"].sign(), other["left"].sign())


def test_rows_and_columns_that_are_zero_stay_zero() -> None:
    w, x = heavy(OUT, IN), correlated(600, IN)
    w[3] = 0
    w[:, 9] = 0
    x[:, 20] = 0  # no input reaches this column
    found = QTIP(state_bits=8).compress(Dense.of(w), gram(x)).unpack()
    assert not found[3].any()
    assert not found[:, [9, 20]].any()


def test_scales_are_compromises_of_norms_and_inputs() -> None:
    w, moment = heavy(OUT, IN).double(), gaussian(IN, seed=3).double().square() + 0.1
    rows, columns = incoherent_scales(w, moment, 0)
    root = w.norm(dim=1).sqrt()
    torch.testing.assert_close(rows.abs(), root / root.mean(), check_dtype=False)
    expected = (w / rows[:, None]).norm(dim=0).sqrt() / moment**0.125
    torch.testing.assert_close(columns.abs(), expected / expected.mean(), check_dtype=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"bits": 5}, "bits must be 1 to 4"), ({"bits": 4, "state_bits": 7}, "between 8"), ({"damping": 0.0}, "damping")],
)
def test_settings_out_of_range_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QTIP(**settings)  # type: ignore[arg-type]

"""SqueezeLLM: tables near the optimum, codes those of the loop in float64, outliers kept."""

from typing import Any

import pytest
import torch

from decoct.methods.quantize.rtn import RTN
from decoct.methods.quantize.squeezellm import SqueezeLLM, squeeze
from decoct.ops.codebook import nearest
from decoct.stats import Gram
from decoct.weights import Codebook, Dense, Masked, Sparse, Sum, Weight
from tests.reference import gptq as loop
from tests.reference import kmeans as reference
from tests.reference.inputs import correlated, gaussian, hessian, output_error

OUT, IN = 16, 64


def setting(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return gaussian(OUT, IN, seed=seed + 7), correlated(3 * IN, IN, seed)


def gram(x: torch.Tensor) -> Gram:
    stat = Gram.empty(x.shape[1])
    stat.add(x)
    return stat


def parts(weight: Weight) -> tuple[Codebook, Sparse]:
    assert isinstance(weight, Sum)
    base, outliers = weight.terms
    assert isinstance(base, Codebook)
    assert isinstance(outliers, Sparse)
    return base, outliers


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_without_feedback_it_is_the_weighted_optimum(bits: int) -> None:
    w, x = setting()
    weight = SqueezeLLM(bits=bits, outliers=0, feedback=False).compress(Dense.of(w), gram(x))
    assert isinstance(weight, Codebook)
    assert weight.table.dtype == torch.bfloat16
    assert torch.equal(weight.unpack_codes(), nearest(w, weight.table.squeeze(2).float()))
    importance = torch.diagonal(hessian(x)).tolist()
    for row, table in zip(w.tolist(), weight.table.squeeze(2).tolist(), strict=True):
        least = reference.least_error(row, importance, 2**bits)
        assert reference.error(row, importance, table) <= 1.02 * least


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("outliers", [0.0, 0.02])
def test_with_feedback_codes_are_those_of_the_loop(outliers: float, act_order: bool) -> None:
    w, x = setting()
    weight = SqueezeLLM(bits=3, outliers=outliers, act_order=act_order).compress(Dense.of(w), gram(x))
    base, apart = (weight, None) if isinstance(weight, Codebook) else parts(weight)
    assert isinstance(base, Codebook)
    tables = base.table.squeeze(2).tolist()
    kept = torch.zeros(OUT, IN, dtype=torch.bool) if apart is None else apart.survivors()

    def rounded(column: torch.Tensor, j: int) -> torch.Tensor:
        near = [t[reference.nearest(v, t)] for v, t in zip(column.tolist(), tables, strict=True)]
        stored = (column - torch.tensor(near)).bfloat16().double()
        return torch.tensor(near, dtype=torch.float64) + torch.where(kept[:, j], stored, 0)

    expected = loop.column_loop(w, hessian(x), rounded, act_order=act_order)
    differing = ((weight.unpack().double() - expected).abs() > 1e-2).any(1)
    assert int(differing.sum()) <= 1


@pytest.mark.parametrize("feedback", [True, False])
def test_outliers_are_the_largest_and_are_kept_almost_exactly(feedback: bool) -> None:
    w, x = setting()
    weight = SqueezeLLM(bits=2, outliers=0.05, feedback=feedback).compress(Dense.of(w), gram(x))
    _, apart = parts(weight)
    count = round(0.05 * OUT * IN)
    largest = w.abs().flatten().topk(count).values[-1]
    assert torch.equal(apart.survivors(), w.abs() >= largest)
    assert apart.values.dtype == torch.bfloat16
    if not feedback:
        torch.testing.assert_close(weight.unpack()[apart.survivors()], w[apart.survivors()], rtol=2**-8, atol=0)


def test_every_bit_is_counted() -> None:
    w, x = setting()
    for bits in range(1, 9):
        weight = SqueezeLLM(bits=bits, outliers=0).compress(Dense.of(w), gram(x))
        assert weight.bits_per_weight == bits + 16 * 2**bits / IN
    weight = SqueezeLLM(bits=4, outliers=10 / (OUT * IN)).compress(Dense.of(w), gram(x))
    assert weight.nbytes == OUT * IN // 2 + OUT * 16 * 2 + 10 * (2 + 2) + OUT * 4


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_each_part_pays(bits: int) -> None:
    w, x = setting()
    w[::5, ::7] *= 4
    fields: list[dict[str, Any]] = [
        {"feedback": False, "outliers": 0.0},
        {"feedback": False, "outliers": 0.02},
        {"feedback": True, "outliers": 0.02},
    ]
    errors = [output_error(RTN(bits=bits, group_size="channel").compress(Dense.of(w)).unpack() - w, x)]
    for each in fields:
        weight = SqueezeLLM(bits=bits, **each).compress(Dense.of(w), gram(x))
        errors.append(output_error(weight.unpack() - w, x))
    assert errors[1] < 0.7 * errors[0]
    assert errors[2] < 0.9 * errors[1]
    assert errors[3] < 0.7 * errors[2]


@pytest.mark.parametrize("feedback", [True, False])
@pytest.mark.parametrize("pruned", ["sparse", "masked"])
def test_a_pruned_weight_keeps_its_mask(pruned: str, feedback: bool) -> None:
    w, x = setting()
    mask = gaussian(OUT, IN, seed=3) > 0
    before: Weight = Sparse.of(w, mask) if pruned == "sparse" else Masked.of(Dense.of(w), mask)
    after = SqueezeLLM(bits=3, feedback=feedback, outliers=0.02).compress(before, gram(x))
    assert isinstance(after, Masked)
    assert torch.equal(after.survivors(), mask)
    _, apart = parts(after.inner)
    assert not (apart.survivors() & ~mask).any()
    dense = SqueezeLLM(bits=3, feedback=feedback, outliers=0.02).compress(Dense.of(w), gram(x)).unpack() * mask
    assert output_error(after.unpack() - w * mask, x) < output_error(dense - w * mask, x)


def test_sensitivities_may_differ_from_entry_to_entry() -> None:
    """A Fisher diagonal has the matrix's own shape: where it is zero, a weight has no say in its row's table."""
    w, _ = setting()
    sensitivity = torch.ones_like(w)
    sensitivity[:, IN // 2 :] = 0
    sensitivity[3] = sensitivity[3].flip(0)
    none: dict[str, Any] = {"num_outliers": 0, "elimination": None, "mask": None, "dtype": torch.float32}
    values = squeeze(w, sensitivity, bits=5, **none).unpack()
    error = (values - w).square()
    halves = error[:, : IN // 2].mean(1), error[:, IN // 2 :].mean(1)
    cared, ignored = (torch.cat([h[:3], h[4:]]) for h in halves)
    assert bool((cared < 0.1 * ignored).all())
    assert float(halves[1][3]) < 0.1 * float(halves[0][3])


@pytest.mark.parametrize(
    "wrong", [{"bits": 0}, {"bits": 9}, {"outliers": -0.1}, {"outliers": 0.5}, {"damping": 0}, {"damping": 2}]
)
def test_impossible_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SqueezeLLM(**wrong)

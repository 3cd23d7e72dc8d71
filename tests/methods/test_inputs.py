"""Rounded inputs and LLM.int8(): what they compute, against products in float64 from the formulas."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from decoct.methods.factorize.svd_llm import SVDLLM
from decoct.methods.quantize.inputs import Inputs
from decoct.methods.quantize.llm_int8 import LLMInt8
from decoct.methods.quantize.mxfp import MXFP
from decoct.methods.quantize.qtip import QTIP
from decoct.methods.quantize.rtn import RTN
from decoct.ops.hadamard import hadamard
from decoct.stats import AbsMax, Gram
from decoct.weights import (
    Columns,
    Dense,
    GroupInt,
    LowRank,
    Masked,
    QuantizedInput,
    Rotated,
    Sparse,
    Sum,
    Weight,
    ready,
)
from tests.reference.input_grids import token
from tests.reference.inputs import correlated, gaussian

OUT, IN, TOKENS = 24, 64, 40


def inputs() -> torch.Tensor:
    return correlated(TOKENS, IN)


def outlying() -> torch.Tensor:
    """Two features far out, as LLM.int8() found them."""
    x = gaussian(TOKENS, IN)
    x[:, [3, 40]] *= 50
    return x


def dense(dtype: torch.dtype = torch.float32) -> Dense:
    return Dense.of(gaussian(OUT, IN, seed=1, dtype=dtype))


def largest(x: torch.Tensor) -> AbsMax:
    stat = AbsMax.empty(x.shape[1])
    stat.add(x)
    return stat


def rounded(x: torch.Tensor, size: int | None = None, **settings: Any) -> torch.Tensor:
    """The reference's inputs, float64."""
    rows = [token(row, "int", size or x.shape[1], **settings) for row in x.double().tolist()]
    return torch.tensor(rows, dtype=torch.float64)


def product(x: torch.Tensor, weight: Weight) -> torch.Tensor:
    return x @ weight.unpack(torch.float32).double().T


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("size", ["channel", "tensor"])
def test_products_of_integers_are_exact(bits: int, size: str) -> None:
    weight = Inputs(bits=8).compress(RTN(bits=bits, group_size=size).compress(dense(), None), None)
    assert isinstance(weight, QuantizedInput)
    assert weight.multiplies_integers
    x = inputs()
    close(weight.apply(x), product(rounded(x), weight))
    assert ready(weight, torch.float32) is weight
    for shape in ((TOKENS, IN), (5, 8, IN), (1, IN), (0, IN)):
        y = weight.apply(x.flatten()[: torch.Size(shape).numel()].reshape(shape))
        assert y.shape == (*shape[:-1], OUT)
    torch.testing.assert_close(weight.apply(x), weight.inner.apply(weight.rounded(x)), rtol=1e-4, atol=1e-4)


def test_products_of_integers_round_once_in_16_bits() -> None:
    weight = Inputs(bits=8).compress(RTN(bits=8, group_size="channel").compress(dense(torch.bfloat16), None), None)
    x = inputs().bfloat16()
    exact = product(rounded(x), weight)
    found = weight.apply(x)
    assert found.dtype == torch.bfloat16
    assert float((found.double() - exact).abs().max()) <= float(exact.abs().max()) * 2**-8


MADE: dict[str, tuple[Callable[[], Weight], type[Weight]]] = {
    "groups": (lambda: RTN(bits=4, group_size=16).compress(dense(), None), QuantizedInput),
    "asymmetric": (lambda: RTN(bits=8, group_size="channel", symmetric=False).compress(dense(), None), QuantizedInput),
    "floats": (lambda: MXFP(format="mxfp4").compress(dense(), None), QuantizedInput),
    "dense": (dense, QuantizedInput),
    "masked": (lambda: RTN(bits=4, group_size=16).compress(sparse(), None), QuantizedInput),
}


def sparse() -> Sparse:
    return Sparse.of(dense().values, gaussian(OUT, IN, seed=2) > 0)


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("settings", [{}, {"symmetric": False}, {"bits": 4, "clip_ratio": 0.9}, {"group_size": 16}])
def test_other_products_are_those_of_rounded_inputs(name: str, settings: dict[str, Any]) -> None:
    make, kind = MADE[name]
    weight = Inputs(**settings).compress(make(), None)
    assert isinstance(weight, kind)
    assert weight.nbytes == make().nbytes
    x = inputs()
    reference = {"clip" if key == "clip_ratio" else key: value for key, value in settings.items()}
    expected = product(rounded(x, reference.pop("group_size", None), **reference), weight)
    lost = float((weight.apply(x).double() - expected).square().mean())
    assert lost < 1e-3 * float((product(x.double(), weight) - expected).square().mean())  # a near tie or two


def test_a_rotated_weight_rounds_rotated_inputs() -> None:
    stat = Gram.empty(IN)
    stat.add(inputs())
    rotated = QTIP(bits=4).compress(dense(), stat)
    assert isinstance(rotated, Rotated)
    weight = Inputs(bits=4).compress(rotated, None)
    assert isinstance(weight, Rotated)
    x = outlying()
    turned = hadamard(x.double() * rotated.right.double())
    middle = rounded(turned, bits=4) @ rotated.inner.unpack(torch.float32).double().T
    expected = hadamard(middle, inverse=True) * rotated.left.double()
    lost = float((weight.apply(x).double() - expected).square().mean())
    exact = product(x.double(), rotated)
    assert lost < 0.02 * float((expected - exact).square().mean())
    outside = QuantizedInput.of(rotated, Inputs(bits=4).grid)
    before, after = (float((w.apply(x).double() - exact).square().mean()) for w in (outside, weight))
    assert after < 0.5 * before  # the rotation spreads the outliers over all features


def test_both_factors_of_a_pair_round_theirs() -> None:
    stat = Gram.empty(IN)
    stat.add(inputs())
    pair = SVDLLM(keep=0.8).compress(dense(), stat)
    weight = Inputs().compress(pair, None)
    assert isinstance(weight, LowRank)
    assert isinstance(pair, LowRank)
    x = inputs()
    middle = product(rounded(x), pair.right).float()
    expected = product(rounded(middle), pair.left)
    lost = float((weight.apply(x).double() - expected).square().mean())
    assert lost < 1e-2 * float((expected - product(x.double(), pair)).square().mean())


@pytest.mark.parametrize("form", ["int", "fp8"])
def test_one_scale_for_all_is_that_of_the_calibration_text(form: str) -> None:
    method = Inputs(format=form, group_size="tensor")
    assert method.stat is AbsMax
    x = inputs()
    weight = method.compress(dense(), largest(x))
    assert isinstance(weight, QuantizedInput)
    assert weight.scale is not None
    top = 127 if form == "int" else 448
    assert float(weight.scale) == pytest.approx(float(x.abs().max()) / top, rel=1e-6)
    assert weight.nbytes == dense().nbytes + 4
    beyond = weight.rounded(10 * x)
    assert float(beyond.abs().max()) <= float(x.abs().max()) * 129 / 127


def test_llm_int8_keeps_outlying_features_whole() -> None:
    x = outlying()
    weight = LLMInt8().compress(dense(), largest(x))
    assert isinstance(weight, Sum)
    ints, whole = weight.terms
    assert isinstance(ints, QuantizedInput)
    assert isinstance(whole, Columns)
    assert ints.kept is not None
    assert ints.kept.tolist() == whole.index.tolist() == [3, 40]
    assert not ints.unpack()[:, [3, 40]].any()
    rest = dense().values.clone()
    rest[:, [3, 40]] = 0
    codes = RTN(bits=8, group_size="channel").compress(Dense.of(rest), None)
    others = rounded(x, kept=(3, 40))
    others[:, [3, 40]] = 0
    expected = product(others, codes) + x[:, [3, 40]].double() @ whole.values.double().T
    close(weight.apply(x), expected)


def test_llm_int8_loses_less_than_rounding_all_features() -> None:
    x = outlying()
    exact = product(x.double(), dense())
    plain = Inputs().compress(RTN(bits=8, group_size="channel").compress(dense(), None), None)
    found = LLMInt8().compress(dense(), largest(x))
    before, after = (float((w.apply(x).double() - exact).square().mean()) for w in (plain, found))
    assert after < 0.1 * before


def test_llm_int8_without_outliers_is_w8a8() -> None:
    weight = LLMInt8().compress(dense(), largest(0.1 * gaussian(TOKENS, IN)))
    plain = Inputs().compress(RTN(bits=8, group_size="channel").compress(dense(), None), None)
    assert isinstance(weight, QuantizedInput)
    assert torch.equal(weight.apply(inputs()), plain.apply(inputs()))


def test_llm_int8_keeps_the_largest_and_no_more_than_allowed() -> None:
    x = gaussian(TOKENS, IN) * torch.linspace(1, 100, IN)
    weight = LLMInt8(keep=0.1).compress(dense(), largest(x))
    assert isinstance(weight, Sum)
    assert isinstance(weight.terms[1], Columns)
    order = x.abs().amax(0).argsort(descending=True)[:6]
    assert weight.terms[1].index.tolist() == sorted(order.tolist())
    assert isinstance(LLMInt8(keep=0.0).compress(dense(), largest(x)), QuantizedInput)


def test_llm_int8_keeps_a_mask() -> None:
    weight = LLMInt8().compress(sparse(), largest(outlying()))
    assert isinstance(weight, Sum)
    assert isinstance(weight.terms[0], QuantizedInput)
    assert isinstance(weight.terms[0].inner, Masked)
    assert not weight.unpack()[~sparse().survivors()].any()


def test_a_quantizer_may_follow_inside() -> None:
    weight = RTN(bits=4, group_size=16).compress(Inputs().compress(dense(), None), None)
    assert isinstance(weight, QuantizedInput)
    assert isinstance(weight.inner, GroupInt)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "fp9"}, "format must be one of int, fp8"),
        ({"bits": 9}, "bits must be 2 to 8"),
        ({"group_size": "channel"}, "group_size must be a positive number, token or tensor"),
        ({"format": "mxfp4", "group_size": "token"}, "leave group_size out"),
        ({"symmetric": False, "format": "fp8"}, "no zero points"),
        ({"clip_ratio": 1.5}, "clip_ratio must be above 0 and at most 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Inputs(**settings)
    for wrong in ({"threshold": 0.0}, {"keep": 1.5}):
        with pytest.raises(ValueError, match=r"threshold must be|keep must lie"):
            LLMInt8(**wrong)

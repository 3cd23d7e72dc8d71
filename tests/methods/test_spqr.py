"""SpQR: codes and outliers are those of the loop in float64, every bit is counted, and each part pays."""

from typing import Any

import pytest
import torch

from decoct.methods.quantize.gptq import GPTQ
from decoct.methods.quantize.spqr import SpQR
from decoct.ops.feedback import Elimination
from decoct.stats import Gram
from decoct.weights import Dense, Masked, Sparse, Sum, TwoLevelInt, Weight
from tests.reference import gptq as loop
from tests.reference import spqr as reference
from tests.reference.inputs import correlated, gaussian, hessian, output_error

OUT, IN = 32, 64


def setting(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    w = gaussian(OUT, IN, seed=seed + 7)
    w[::9, ::11] *= 5
    return w, correlated(3 * IN, IN, seed)


def gram(x: torch.Tensor) -> Gram:
    stat = Gram.empty(x.shape[1])
    stat.add(x)
    return stat


def base_of(weight: Weight) -> TwoLevelInt:
    base = weight.terms[0] if isinstance(weight, Sum) else weight
    assert isinstance(base, TwoLevelInt)
    return base


def check_loop(weight: Weight, w: torch.Tensor, x: torch.Tensor, method: SpQR, mask: torch.Tensor | None) -> None:
    """Given the grid, the values are those of the paper's loop."""
    grid = base_of(weight).grid()
    assert grid.zero is not None
    pivots = Elimination.of(gram(x).matrix(), damping=method.damping, act_order=method.act_order).pivots().double()
    threshold = torch.inf
    if method.outlier_threshold is not None:
        threshold = method.outlier_threshold * float((w.double().square().mean(0) / pivots**2).mean())
    top = 2**method.bits - 1

    def rounded(column: torch.Tensor, j: int) -> torch.Tensor:
        found = []
        for i, value in enumerate(column.tolist()):
            if mask is not None and not mask[i, j]:
                found.append(0.0)
                continue
            g = j // grid.group_size
            near = reference.rounded(value, float(grid.scale[i, g]), int(grid.zero[i, g]), top)
            lost = value - near
            apart = (lost / float(pivots[j])) ** 2 > threshold
            found.append(near + (float(torch.tensor(lost).bfloat16()) if apart else 0.0))
        return torch.tensor(found, dtype=torch.float64)

    expected = loop.column_loop(w, hessian(x), rounded, damping=method.damping, act_order=method.act_order)
    differing = ((weight.unpack().double() - expected).abs() > 2e-2).any(1)
    assert int(differing.sum()) <= 1


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("damping", [0.01, 1.0])
@pytest.mark.parametrize("outlier_threshold", [None, 0.05])
def test_codes_and_outliers_are_those_of_the_loop(
    outlier_threshold: float | None, damping: float, act_order: bool
) -> None:
    w, x = setting()
    method = SpQR(bits=3, outlier_threshold=outlier_threshold, damping=damping, act_order=act_order)
    weight = method.compress(Dense.of(w), gram(x))
    assert isinstance(weight, TwoLevelInt if outlier_threshold is None else Sum)
    check_loop(weight, w, x, method, None)


@pytest.mark.parametrize("pruned", ["sparse", "masked"])
def test_a_pruned_weight_keeps_its_mask(pruned: str) -> None:
    w, x = setting()
    mask = gaussian(OUT, IN, seed=3) > 0
    before: Weight = Sparse.of(w, mask) if pruned == "sparse" else Masked.of(Dense.of(w), mask)
    method = SpQR(bits=3, outlier_threshold=0.05, damping=0.01)
    after = method.compress(before, gram(x))
    assert isinstance(after, Masked)
    assert torch.equal(after.survivors(), mask)
    assert not after.inner.unpack()[~mask].any(), "zero is on the grid, and nothing pruned is an outlier"
    check_loop(after.inner, w * mask, x, method, mask)


def test_real_bits() -> None:
    w, x = gaussian(64, 256), correlated(600, 256)
    weight = SpQR(outlier_threshold=None).compress(Dense.of(w), gram(x))
    assert weight.bits_per_weight == 4 + (3 + 4) / 16 + 2 * 16 / (16 * 16)
    some = SpQR(bits=3, damping=0.01).compress(Dense.of(w), gram(x))
    assert isinstance(some, Sum)
    base, apart = some.terms
    assert isinstance(apart, Sparse)
    assert base.bits_per_weight == 3 + (3 + 3) / 16 + 2 * 16 / (16 * 16)
    count = int(apart.survivors().sum())
    assert 0 < count < 0.1 * w.numel()
    assert apart.nbytes == min(4 * count + 4 * 64, 2 * count + w.numel() // 8)


def test_outliers_and_small_groups_pay() -> None:
    w, x = setting()
    plain, sparse, gptq = (
        output_error(method.compress(Dense.of(w), gram(x)).unpack() - w, x)
        for method in (SpQR(bits=3, outlier_threshold=None, damping=0.01), SpQR(bits=3, damping=0.01), GPTQ(bits=3))
    )
    assert plain < 0.8 * gptq
    assert sparse < 0.8 * plain


def test_a_higher_threshold_keeps_fewer() -> None:
    w, x = setting()
    counts = []
    for threshold in (0.01, 0.1, 1.0):
        weight = SpQR(bits=3, outlier_threshold=threshold).compress(Dense.of(w), gram(x))
        counts.append(int(weight.terms[1].unpack().count_nonzero()) if isinstance(weight, Sum) else 0)
    assert counts[0] > counts[1] > counts[2]


def test_channels_may_be_groups() -> None:
    w, x = setting()
    weight = base_of(SpQR(group_size="channel").compress(Dense.of(w), gram(x)))
    assert weight.group_size == IN
    assert weight.base.shape == (2, 1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"bits": 1}, {"bits": 9}, {"damping": 0}, {"damping": 2}, {"group_size": 0}, {"group_size": "tensor"},
        {"scale_bits": 0}, {"scale_bits": 9}, {"rows_per_block": 0}, {"outlier_threshold": 0.0},
    ],
)  # fmt: skip
def test_impossible_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SpQR(**wrong)


def test_a_group_size_that_does_not_divide_is_refused_while_planning() -> None:
    with pytest.raises(ValueError, match="group_size 16 does not divide 40"):
        SpQR().check((10, 40))

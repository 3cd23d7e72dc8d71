"""OWQ: the right columns are kept, the rest is rounded as if they were free, and they end where they do most good."""

from typing import Any

import pytest
import torch

from decoct.methods.quantize.gptq import GPTQ
from decoct.methods.quantize.owq import OWQ, weak_columns
from decoct.ops.grid import dequantize, fit_grid, quantize
from decoct.stats import Gram
from decoct.weights import Columns, Dense, GroupInt, Masked, Sparse, Sum, Weight
from tests.reference import gptq as loop
from tests.reference import grids
from tests.reference import owq as reference
from tests.reference.inputs import correlated, gaussian, hessian, output_error

OUT, IN = 16, 64


def setting(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    x = correlated(3 * IN, IN, seed)
    x[:, [5, 40]] *= 12
    return gaussian(OUT, IN, seed=seed + 7), x


def gram(x: torch.Tensor) -> Gram:
    stat = Gram.empty(x.shape[1])
    stat.add(x)
    return stat


def parts(weight: Weight) -> tuple[GroupInt, Columns]:
    assert isinstance(weight, Sum)
    base, whole = weight.terms
    assert isinstance(base, GroupInt)
    assert isinstance(whole, Columns)
    return base, whole


def damped(x: torch.Tensor, damping: float = 0.01) -> torch.Tensor:
    return torch.tensor(loop.prepared(hessian(x).tolist(), damping, act_order=False)[0], dtype=torch.float64)


@pytest.mark.parametrize("keep", [0.001, 0.05, 0.5])
def test_the_weakest_columns_are_kept(keep: float) -> None:
    w, x = setting()
    grid = fit_grid(w, bits=3, group_size=8)
    found = weak_columns(w, gram(x).matrix().diagonal(), grid, keep).tolist()
    cost = reference.weakness(w, hessian(x), dequantize(quantize(w, grid), grid))
    assert found == sorted(range(IN), key=lambda j: -cost[j])[: max(1, round(keep * IN))]


def test_the_rest_is_rounded_knowing_that_they_will_make_up_for_it() -> None:
    """Minimising over the kept columns leaves the Schur complement of their Hessian for the others."""
    w, x = setting()
    weight = OWQ(bits=3, group_size=8, keep=0.05, act_order=False).compress(Dense.of(w), gram(x))
    base, whole = parts(weight)
    kept = whole.index.tolist()
    rest = [j for j in range(IN) if j not in kept]
    H, grid = damped(x), base.grid()
    schur = H[rest][:, rest] - H[rest][:, kept] @ torch.linalg.inv(H[kept][:, kept]) @ H[kept][:, rest]
    middle = [[4.0] * grid.scale.shape[1]] * OUT
    own = grids.Grids(grid.scale.tolist(), middle, 3, 8)

    def rounded(column: torch.Tensor, k: int) -> torch.Tensor:
        return torch.tensor(
            [own.value(own.code(v, i, rest[k]), i, rest[k]) for i, v in enumerate(column.tolist())]
        ).double()

    expected = loop.column_loop(w[:, rest], schur, rounded, damping=0.0, act_order=False)
    differing = ((base.unpack()[:, rest].double() - expected).abs() > 1e-5).any(1)
    assert int(differing.sum()) <= 1


@pytest.mark.parametrize("act_order", [False, True])
def test_kept_columns_end_where_they_do_most_good(act_order: bool) -> None:
    w, x = setting()
    weight = OWQ(bits=3, group_size=8, keep=0.05, act_order=act_order).compress(Dense.of(w), gram(x))
    base, whole = parts(weight)
    kept = whole.index.tolist()
    assert len(kept) == 3
    assert {5, 40} <= set(kept)
    assert not base.unpack()[:, kept].any()
    best = reference.best_kept(w, base.unpack(), kept, damped(x))
    torch.testing.assert_close(whole.values.double(), best, rtol=2**-7, atol=1e-3)


def test_loud_columns_do_not_widen_the_grid_of_their_neighbours() -> None:
    w, x = setting()
    w[:, [5, 40]] *= 30
    base, _ = parts(OWQ(bits=4, group_size=8, keep=0.03).compress(Dense.of(w), gram(x)))
    quiet = w.index_fill(1, torch.tensor([5, 40]), 0)
    assert (
        float(base.scale.float().abs().max()) < float(fit_grid(quiet, bits=4, group_size=8).scale.float().max()) * 1.01
    )


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_it_is_better_than_gptq(bits: int, symmetric: bool) -> None:
    w, x = setting()
    fields: dict[str, Any] = {"bits": bits, "group_size": 16, "symmetric": symmetric}
    ours = OWQ(**fields, keep=0.05).compress(Dense.of(w), gram(x)).unpack()
    theirs = GPTQ(**fields).compress(Dense.of(w), gram(x)).unpack()
    assert output_error(ours - w, x) < 0.8 * output_error(theirs - w, x)


@pytest.mark.parametrize("pruned", ["sparse", "masked"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_pruned_weight_keeps_its_mask(pruned: str, symmetric: bool) -> None:
    w, x = setting()
    mask = gaussian(OUT, IN, seed=3) > 0
    before: Weight = Sparse.of(w, mask) if pruned == "sparse" else Masked.of(Dense.of(w), mask)
    after = OWQ(bits=4, group_size=8, symmetric=symmetric).compress(before, gram(x))
    assert isinstance(after, Masked)
    assert torch.equal(after.survivors(), mask)
    assert not after.inner.unpack()[~mask].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_bit_is_counted(dtype: torch.dtype) -> None:
    w, x = setting()
    weight = OWQ(bits=4, group_size=16, keep=0.05).compress(Dense.of(w.to(dtype)), gram(x))
    assert weight.nbytes == OUT * IN // 2 + OUT * 4 * 2 + OUT * 3 * 2 + 3 * 2
    assert weight.dtype == dtype


@pytest.mark.parametrize(
    "wrong", [{"bits": 1}, {"bits": 9}, {"damping": 0}, {"group_size": 0}, {"keep": 0.0}, {"keep": 1.0}]
)
def test_impossible_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        OWQ(**wrong)


def test_a_group_size_that_does_not_divide_is_refused_while_planning() -> None:
    with pytest.raises(ValueError, match="group_size 64 does not divide 96"):
        OWQ().check((10, 96))

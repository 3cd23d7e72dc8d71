"""SparseGPT against the paper's loop in float64, alone and with rounding; what earlier steps made is kept."""

from typing import Any

import pytest
import torch

from decoct.methods.prune.sparsegpt import SparseGPT
from decoct.methods.prune.wanda import Wanda
from decoct.methods.quantize.gptq import GPTQ
from decoct.methods.quantize.hqq import HQQ
from decoct.ops.grid import Grid
from decoct.stats import ColumnNorm, Gram
from decoct.weights import Dense, GroupInt, Masked, Sparse, Weight
from tests.reference import grids
from tests.reference import pruning as reference
from tests.reference.inputs import correlated, gaussian, hessian, output_error

OUT, IN = 12, 48


def setting(dead: tuple[int, ...] = ()) -> tuple[torch.Tensor, torch.Tensor, Gram]:
    x = correlated(4 * IN, IN)
    x[:, list(dead)] = 0
    stat = Gram.empty(IN)
    stat.add(x)
    return gaussian(OUT, IN, seed=7), x, stat


def check(found: Weight, expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    """The same survivors and values; one row may part ways at what is a tie to float32."""
    assert isinstance(found, Sparse | Masked)
    values, alive = expected
    wrong = ((found.survivors() != alive) | ((found.unpack().double() - values).abs() > 1e-3)).any(1)
    assert int(wrong.sum()) <= 1
    assert int(found.survivors().sum()) == int(alive.sum())


@pytest.mark.parametrize("dead", [(), (0, 9, 47)])
@pytest.mark.parametrize(
    ("settings", "block", "num_dropped", "by_row"),
    [
        ({"sparsity": 0.5}, 48, 24, False),
        ({"sparsity": 0.5, "block_size": 16}, 16, 8, False),
        ({"sparsity": 0.75, "block_size": 24, "scope": "row"}, 24, 18, True),
        ({"n": 2, "m": 4}, 4, 2, True),
        ({"n": 2, "m": 4, "block_size": 1}, 4, 2, True),
        ({"n": 1, "m": 6, "block_size": 20}, 6, 5, True),
        ({"n": 8, "m": 16}, 16, 8, True),
    ],
)
def test_it_is_the_papers_loop(
    settings: dict[str, Any], block: int, num_dropped: int, by_row: bool, dead: tuple[int, ...]
) -> None:
    w, x, stat = setting(dead)
    found = SparseGPT(**settings).compress(Dense.of(w), stat)
    check(found, reference.sparsegpt(w, hessian(x), num_dropped, block=block, by_row=by_row))


def test_small_inputs_among_dead_ones_are_pruned_as_large_ones() -> None:
    """Dead features must not weigh in the mean that damping is a fraction of."""
    w, x, stat = setting(dead=tuple(range(0, IN, 2)))
    small = Gram.empty(IN)
    small.add(0.01 * x)
    found, same = (SparseGPT(sparsity=0.75).compress(Dense.of(w), each) for each in (stat, small))
    assert isinstance(found, Sparse)
    assert isinstance(same, Sparse)
    assert torch.equal(found.survivors(), same.survivors())
    torch.testing.assert_close(found.unpack(), same.unpack(), rtol=1e-4, atol=1e-5)


def rounder(grid: Grid) -> Any:
    zero = torch.full_like(grid.scale.float(), 2 ** (grid.bits - 1)) if grid.zero is None else grid.zero
    own = grids.Grids(grid.scale.tolist(), zero.tolist(), grid.bits, grid.group_size)

    def rounded(column: torch.Tensor, j: int) -> torch.Tensor:
        return torch.tensor([own.value(own.code(v, i, j), i, j) for i, v in enumerate(column.tolist())]).double()

    return rounded


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("settings", "block", "dropped"), [({"sparsity": 0.5}, 48, 24), ({"n": 2, "m": 4}, 4, 2)])
def test_jointly_with_rounding_it_is_the_papers_loop(
    settings: dict[str, Any], block: int, dropped: int, symmetric: bool
) -> None:
    w, x, stat = setting()
    found = SparseGPT(**settings, bits=3, group_size=16, symmetric=symmetric).compress(Dense.of(w), stat)
    assert isinstance(found, Masked)
    assert isinstance(found.inner, GroupInt)
    assert (found.inner.bits, found.inner.group_size, found.inner.symmetric) == (3, 16, symmetric)
    assert not found.inner.unpack()[~found.survivors()].any()
    expected = reference.sparsegpt(
        w, hessian(x), dropped, block=block, by_row=block == 4, rounded=rounder(found.inner.grid())
    )
    check(found, expected)


def test_jointly_it_loses_no_more_than_one_step_after_the_other() -> None:
    w, x, stat = setting()
    for pattern in ({"sparsity": 0.5}, {"n": 2, "m": 4}):
        quantizer = GPTQ(bits=3, group_size=16, act_order=False)
        joint = SparseGPT(**pattern, bits=3, group_size=16).compress(Dense.of(w), stat)
        after = quantizer.compress(SparseGPT(**pattern).compress(Dense.of(w), stat), stat)
        assert isinstance(after, Masked)
        assert isinstance(after.inner, GroupInt)
        assert output_error(joint.unpack() - w, x) < 1.05 * output_error(after.unpack() - w, x)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("settings", [{"sparsity": 0.5}, {"n": 2, "m": 4}], ids=str)
def test_what_is_quantized_keeps_its_grid(settings: dict[str, Any], symmetric: bool) -> None:
    w, x, stat = setting()
    quantized = GPTQ(bits=4, group_size=16, symmetric=symmetric).compress(Dense.of(w), stat)
    assert isinstance(quantized, GroupInt)
    found = SparseGPT(**settings).compress(quantized, stat)
    assert isinstance(found, Masked)
    assert isinstance(found.inner, GroupInt)
    assert torch.equal(found.inner.scale, quantized.scale)
    assert found.inner.symmetric == symmetric
    assert float(found.survivors().float().mean()) == 0.5
    norm = ColumnNorm.empty(IN)
    norm.add(x)
    unmoved = Wanda(**settings).compress(quantized, norm)
    assert output_error(found.unpack() - w, x) < 0.8 * output_error(unmoved.unpack() - w, x)
    again = SparseGPT(sparsity=0.75).compress(found, stat)
    assert isinstance(again, Masked)
    assert not (again.survivors() & ~found.survivors()).any()
    assert torch.equal(again.unpack() == 0, (again.inner.unpack() * again.survivors()) == 0)


def test_other_bits_than_a_weight_has_are_refused() -> None:
    w, _, stat = setting()
    with pytest.raises(ValueError, match="sparsegpt cannot be applied to a GroupInt"):
        SparseGPT(bits=3, group_size=16).compress(GPTQ(bits=4, group_size=16).compress(Dense.of(w), stat), stat)
    with pytest.raises(ValueError, match="sparsegpt cannot be applied to a GroupInt"):
        SparseGPT().compress(HQQ(bits=4, group_size=16, zero="real").compress(Dense.of(w)), stat)


@pytest.mark.parametrize("scope", ["row", "layer"])
@pytest.mark.parametrize("block_size", [7, 16, 128])
def test_an_uneven_mask_counts_across_blocks(scope: str, block_size: int) -> None:
    w, _, stat = setting()
    mask = torch.ones(OUT, IN, dtype=torch.bool)
    mask[:, 30:44] = False
    mask[3] = False
    found = SparseGPT(sparsity=0.5, scope=scope, block_size=block_size).compress(Sparse.of(w * mask, mask), stat)
    assert isinstance(found, Sparse)
    alive = found.survivors()
    assert not (alive & ~mask).any()
    if scope == "row":
        assert alive.sum(1).tolist() == [0 if i == 3 else IN // 2 for i in range(OUT)]
    else:
        assert int(alive.sum()) == OUT * IN // 2


@pytest.mark.parametrize(
    "wrong", [{"bits": 1}, {"bits": 4, "group_size": 0}, {"block_size": 0}, {"damping": 0}, {"damping": 2}], ids=str
)
def test_impossible_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=list(wrong)[-1]):
        SparseGPT(**wrong)


def test_a_group_size_that_does_not_divide_is_refused_while_planning() -> None:
    SparseGPT().check((8, 96))
    with pytest.raises(ValueError, match="group_size 64 does not divide 96"):
        SparseGPT(bits=4).check((8, 96))

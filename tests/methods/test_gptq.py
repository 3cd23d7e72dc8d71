"""GPTQ against optimal brain quantization by elimination, in float64.

Codes are compared, not errors. float32 and float64 can disagree on a value that lies on the middle of two grid points
to within rounding; that code differs by one, and all later codes of the same row may then differ too. With seeded
inputs this hits none or one of a matrix's rows, so `check_codes` lets a single row go if it is no worse.
"""

from typing import Any

import pytest
import torch

from decoct.methods.quantize.gptq import GPTQ, gptq_round
from decoct.methods.quantize.rtn import RTN
from decoct.ops.grid import Grid, dequantize, fit_grid
from decoct.stats import Gram
from decoct.weights import Dense, GroupInt, Masked, Sparse, Weight
from tests.reference import gptq as reference
from tests.reference import grids
from tests.reference.inputs import correlated, gaussian, hessian, output_error

OUT, IN = 16, 40


def setting(dead: tuple[int, ...] = (), width: int = IN, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix and its inputs; `dead` features never fire."""
    x = correlated(3 * width, width, seed)
    x[:, list(dead)] = 0
    return gaussian(OUT, width, seed=seed + 7), x


def gram(x: torch.Tensor) -> Gram:
    stat = Gram.empty(x.shape[1])
    stat.add(x)
    return stat


def random_mask(seed: int = 3) -> torch.Tensor:
    return torch.rand(OUT, IN, generator=torch.Generator().manual_seed(seed)) < 0.5


def reference_grids(grid: Grid) -> grids.Grids:
    zero = torch.full_like(grid.scale.float(), 2 ** (grid.bits - 1)) if grid.zero is None else grid.zero
    return grids.Grids(grid.scale.tolist(), zero.tolist(), grid.bits, grid.group_size)


def check_codes(found: torch.Tensor, expected: list[list[int]], grid: Grid, w: torch.Tensor, x: torch.Tensor) -> None:
    codes = torch.tensor(expected, dtype=torch.uint8)
    differing = (found != codes).any(1)
    assert int(differing.sum()) <= 1
    mine, theirs = (output_error(dequantize(c, grid) - w, x) for c in (found, codes))
    assert mine <= theirs * 1.01


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group_size"), [(2, 8), (3, "channel"), (4, 8), (4, "tensor"), (8, 40)])
def test_codes_are_the_references(bits: int, group_size: int | str, symmetric: bool, act_order: bool) -> None:
    w, x = setting(seed=bits)
    grid = fit_grid(w, bits=bits, group_size=group_size, symmetric=symmetric, scale_dtype=torch.bfloat16)
    expected = reference.obq(w.tolist(), hessian(x).tolist(), reference_grids(grid), act_order=act_order)
    check_codes(gptq_round(w, gram(x).matrix(), grid, act_order=act_order), expected, grid, w, x)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_whole_method_is_the_reference_end_to_end(symmetric: bool, act_order: bool) -> None:
    w, x = setting()
    method = GPTQ(bits=3, group_size=8, symmetric=symmetric, act_order=act_order, clip_search=False)
    weight = method.compress(Dense.of(w), gram(x))
    assert isinstance(weight, GroupInt)
    own = grids.fit(w.tolist(), 3, 8, symmetric, torch.bfloat16)
    expected = reference.obq(w.tolist(), hessian(x).tolist(), own, act_order=act_order)
    check_codes(weight.unpack_codes(), expected, weight.grid(), w, x)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
def test_masked_weights_are_compensated_and_stay_zero(symmetric: bool, act_order: bool) -> None:
    w, x = setting()
    mask = random_mask()
    w = w * mask
    grid = fit_grid(w, bits=3, group_size=8, symmetric=symmetric)
    own = reference_grids(grid)
    expected = reference.obq(w.tolist(), hessian(x).tolist(), own, mask=mask.tolist(), act_order=act_order)
    codes = gptq_round(w, gram(x).matrix(), grid, mask=mask, act_order=act_order)
    check_codes(codes, expected, grid, w, x)
    assert not dequantize(codes, grid)[~mask].any()


@pytest.mark.parametrize("act_order", [False, True])
def test_dead_columns_become_zero_and_disturb_nothing(act_order: bool) -> None:
    dead = (0, 5, 6, 39)
    w, x = setting(dead)
    grid = fit_grid(w, bits=4, group_size=8)
    expected = reference.obq(w.tolist(), hessian(x).tolist(), reference_grids(grid), act_order=act_order)
    codes = gptq_round(w, gram(x).matrix(), grid, act_order=act_order)
    check_codes(codes, expected, grid, w, x)
    assert not dequantize(codes, grid)[:, list(dead)].any()


def test_damping_follows_the_size_of_live_inputs_however_many_are_dead() -> None:
    """Dead features must not weigh in the mean that damping is a fraction of: small inputs would drown in it."""
    w, x = setting(dead=tuple(range(0, IN, 2)))
    grid = fit_grid(w, bits=3, group_size="channel")
    found = [gptq_round(w, gram(factor * x).matrix(), grid)[:, 1::2] for factor in (1.0, 0.01)]
    alone = gptq_round(w[:, 1::2].contiguous(), gram(0.01 * x[:, 1::2]).matrix(), grid)
    for codes in found:
        assert torch.equal(codes, alone)


@pytest.mark.parametrize("clip_search", [False, True])
def test_what_stood_in_a_dead_column_does_not_widen_its_groups_grid(clip_search: bool) -> None:
    """METHODS, GPTQ step 1: w_j = 0 first, then everything else, the grid included."""
    w, x = setting(dead=(4,))
    loud = w.clone()
    loud[:, 4] = 50.0
    quiet = w.clone()
    quiet[:, 4] = 0
    method = GPTQ(bits=4, group_size=8, clip_search=clip_search)
    found, expected = (method.compress(Dense.of(v), gram(x)).unpack() for v in (loud, quiet))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("width", [1, 2, 15, 16, 17, 33, 64, 100])
def test_recursion_over_halves_is_the_loop_over_columns(width: int) -> None:
    for act_order in (False, True):
        w, x = setting(width=width)
        grid = fit_grid(w, bits=3, group_size="channel")
        own = reference_grids(grid)

        def rounded(column: torch.Tensor, j: int, own: grids.Grids = own) -> torch.Tensor:
            pairs = [own.value(own.code(v, i, j), i, j) for i, v in enumerate(column.tolist())]
            return torch.tensor(pairs, dtype=torch.float64)

        expected = reference.column_loop(w, hessian(x), rounded, act_order=act_order)
        found = dequantize(gptq_round(w, gram(x).matrix(), grid, act_order=act_order), grid).double()
        differing = ((found - expected).abs() > 1e-5).any(1)
        assert int(differing.sum()) <= 1


def test_the_two_references_agree() -> None:
    w, x = setting()
    grid = fit_grid(w, bits=3, group_size=8)
    own = reference_grids(grid)
    codes = torch.tensor(reference.obq(w.tolist(), hessian(x).tolist(), own), dtype=torch.uint8)

    def rounded(column: torch.Tensor, j: int) -> torch.Tensor:
        return torch.tensor([own.value(own.code(v, i, j), i, j) for i, v in enumerate(column.tolist())]).double()

    loop = reference.column_loop(w, hessian(x), rounded)
    torch.testing.assert_close(dequantize(codes, grid).double(), loop, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("clip_search", [True, False])
def test_output_error_is_well_below_rounding_to_nearest(bits: int, symmetric: bool, clip_search: bool) -> None:
    w, x = setting(width=64)
    fields: dict[str, Any] = {"bits": bits, "group_size": 16, "symmetric": symmetric, "clip_search": clip_search}
    nearest = RTN(**fields).compress(Dense.of(w)).unpack()
    second_order = GPTQ(**fields).compress(Dense.of(w), gram(x)).unpack()
    assert output_error(second_order - w, x) < 0.7 * output_error(nearest - w, x)


def test_white_inputs_leave_nothing_to_compensate() -> None:
    w = gaussian(OUT, IN)
    fields: dict[str, Any] = {"bits": 3, "group_size": 8}
    nearest = RTN(**fields).compress(Dense.of(w))
    second_order = GPTQ(**fields, clip_search=False).compress(Dense.of(w), Gram.neutral(IN))
    assert torch.equal(nearest.unpack(), second_order.unpack())


@pytest.mark.parametrize("pruned", ["sparse", "masked"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_pruned_weight_keeps_its_mask(pruned: str, symmetric: bool) -> None:
    w, x = setting()
    mask = random_mask()
    before: Weight = Sparse.of(w, mask) if pruned == "sparse" else Masked.of(Dense.of(w), mask)
    after = GPTQ(bits=4, group_size=8, symmetric=symmetric).compress(before, gram(x))
    assert isinstance(after, Masked)
    assert isinstance(after.inner, GroupInt)
    assert torch.equal(after.survivors(), mask)
    assert not after.unpack()[~mask].any()
    assert not after.inner.unpack()[~mask].any()
    nearest = RTN(bits=4, group_size=8, symmetric=symmetric).compress(before)
    assert output_error(after.unpack() - w * mask, x) < output_error(nearest.unpack() - w * mask, x)


def test_fewer_tokens_than_features_still_quantize() -> None:
    w, x = setting()
    for tokens in (1, 5):
        weight = GPTQ(bits=4, group_size=8).compress(Dense.of(w), gram(x[:tokens]))
        assert bool(torch.isfinite(weight.unpack()).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_take_sixteen_bits(dtype: torch.dtype) -> None:
    w, x = setting()
    weight = GPTQ(bits=3, group_size=8).compress(Dense.of(w.to(dtype)), gram(x))
    assert isinstance(weight, GroupInt)
    assert weight.scale.dtype == (torch.bfloat16 if dtype == torch.float32 else dtype)
    assert weight.bits_per_weight == 3 + 16 / 8


@pytest.mark.parametrize("wrong", [{"bits": 1}, {"bits": 9}, {"damping": 0}, {"damping": 2}, {"group_size": 0}])
def test_impossible_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        GPTQ(**wrong)


def test_a_group_size_that_does_not_divide_is_refused_while_planning() -> None:
    with pytest.raises(ValueError, match="group_size 64 does not divide 96"):
        GPTQ().check((10, 96))

"""BiLLM, PB-LLM, OneBit and ternary weights against slow float64 references, and what they keep and store.

As in the tests of GPTQ, a value that lies between two choices to within rounding may go the other way, and take the
rest of its row with it; a single row is let go for that.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch

from decoct.methods.quantize.billm import BiLLM
from decoct.methods.quantize.onebit import OneBit
from decoct.methods.quantize.pb_llm import PBLLM
from decoct.methods.quantize.rtn import RTN
from decoct.methods.quantize.ternary import Ternary
from decoct.ops.packing import unpack_mask
from decoct.stats import Gram
from decoct.weights import Binary, Dense, LowRank, Masked, Sparse, SparseInt, Sum, Weight
from decoct.weights import Ternary as TernaryWeight
from tests.reference import binary as reference
from tests.reference import gptq
from tests.reference.inputs import correlated, gaussian, hessian, output_error

OUT, IN = 12, 40
HALF = torch.bfloat16
CALIBRATED = [Ternary(group_size=8), PBLLM(group_size=8), OneBit(), BiLLM(block_size=16)]
ALL = [*CALIBRATED, Ternary(group_size=8, feedback=False), OneBit(num_rounds=0)]
EACH = pytest.mark.parametrize("method", ALL, ids=lambda m: f"{type(m).__name__}{'' if m.stat else ', no data'}")
Method = Ternary | PBLLM | OneBit | BiLLM


def setting(seed: int = 0, width: int = IN) -> tuple[torch.Tensor, torch.Tensor]:
    return gaussian(OUT, width, seed=seed + 7), correlated(3 * width, width, seed)


def gram(x: torch.Tensor) -> Gram:
    stat = Gram.empty(x.shape[1])
    stat.add(x)
    return stat


def compress(method: Method, weight: Weight | torch.Tensor, x: torch.Tensor) -> Weight:
    given = Dense.of(weight) if isinstance(weight, torch.Tensor) else weight
    return method.compress(given, None if method.stat is None else gram(x))  # type: ignore[arg-type]


def check_rows(found: torch.Tensor, expected: torch.Tensor) -> None:
    differing = ((found.double() - expected).abs() > 1e-4).any(1)
    assert int(differing.sum()) <= 1


def lost(weight: Weight, w: torch.Tensor, x: torch.Tensor) -> float:
    return output_error(weight.unpack(torch.float32) - w, x) / output_error(w, x)


def some(seed: int = 3) -> torch.Tensor:
    return torch.rand(OUT, IN, generator=torch.Generator().manual_seed(seed)) < 0.6


# Ternary


@pytest.mark.parametrize("fit", ["optimal", "absmean"])
@pytest.mark.parametrize("group_size", [8, "channel", "tensor"])
def test_ternary_without_data_is_the_formula(fit: str, group_size: int | str) -> None:
    w, _ = setting()
    found = Ternary(group_size=group_size, fit=fit, feedback=False).compress(Dense.of(w))
    assert isinstance(found, TernaryWeight)
    size = {"channel": IN, "tensor": OUT * IN}.get(str(group_size), 8)
    values = w.flatten().tolist()
    for start in range(0, OUT * IN, size):
        group = values[start : start + size]
        scale = reference.mean([abs(v) for v in group], [1.0] * size)
        if fit == "optimal":
            scale = reference.ternary_scale(group, [1.0] * size)
        scale = float(torch.tensor(scale).to(HALF))
        expected = [reference.trit(v, scale) * scale for v in group]
        assert found.unpack(torch.float32).flatten()[start : start + size].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group_size", [8, "channel", "tensor"])
def test_ternary_with_feedback_is_the_papers_loop(group_size: int | str, act_order: bool) -> None:
    w, x = setting()
    found = Ternary(group_size=group_size, num_refits=0, act_order=act_order).compress(Dense.of(w), gram(x))
    assert isinstance(found, TernaryWeight)
    scale = found.scale.double().expand(OUT, -1)

    def rounded(column: torch.Tensor, j: int) -> torch.Tensor:
        own = scale[:, j // found.group_size].tolist()
        pairs = zip(column.tolist(), own, strict=True)
        return torch.tensor([reference.trit(v, s) * s for v, s in pairs], dtype=torch.float64)

    check_rows(found.unpack(torch.float32), gptq.column_loop(w, hessian(x), rounded, act_order=act_order))


def test_ternary_scales_are_weighted_by_the_hessians_diagonal() -> None:
    w, x = setting()
    found = Ternary(group_size="channel", num_refits=0).compress(Dense.of(w), gram(x))
    assert isinstance(found, TernaryWeight)
    importance = torch.diagonal(hessian(x)).tolist()
    expected = torch.tensor([[reference.ternary_scale(row, importance)] for row in w.tolist()])
    torch.testing.assert_close(found.scale.float(), expected, rtol=4e-3, atol=0)


@pytest.mark.parametrize("group_size", [8, "channel", "tensor"])
def test_each_refit_of_ternary_scales_pays(group_size: int | str) -> None:
    w, x = setting(width=80)
    losses = [lost(compress(Ternary(group_size=group_size, num_refits=n), w, x), w, x) for n in (0, 1, 2)]
    assert losses[1] < losses[0]
    assert losses[2] < losses[0]


def test_ternary_bits_are_what_they_are_called() -> None:
    w, x = setting(width=80)
    assert compress(Ternary(group_size=40), w.to(HALF), x).bits_per_weight == 1.6 + 16 / 40
    assert compress(Ternary(group_size="channel"), w.to(HALF), x).nbytes == OUT * (80 // 5 + 2)
    assert compress(Ternary(group_size="tensor", feedback=False), w.to(HALF), x).nbytes == OUT * 80 // 5 + 2


# PB-LLM


@pytest.mark.parametrize("metric", ["hessian", "magnitude"])
@pytest.mark.parametrize("act_order", [False, True])
def test_pb_llm_is_the_papers_loop(metric: str, act_order: bool) -> None:
    w, x = setting()
    method = PBLLM(salient=0.15, group_size=8, metric=metric, num_refits=0, act_order=act_order)
    found = method.compress(Dense.of(w), gram(x))
    assert isinstance(found, Sum)
    signs, integers = found.terms
    assert isinstance(signs, Binary)
    assert isinstance(integers, SparseInt)
    salient, scale, step = integers.survivors(), signs.scale.double(), integers.scale.double()

    def rounded(column: torch.Tensor, j: int) -> torch.Tensor:
        own = zip(column.tolist(), scale[:, j // 8].tolist(), step[:, 0].tolist(), salient[:, j].tolist(), strict=True)
        return torch.tensor([reference.signs_and_integers(v, a, s, 8, big) for v, a, s, big in own]).double()

    check_rows(found.unpack(torch.float32), gptq.column_loop(w, hessian(x), rounded, act_order=act_order))


@pytest.mark.parametrize("metric", ["hessian", "magnitude"])
def test_pb_llm_keeps_the_entries_that_the_metric_ranks_first(metric: str) -> None:
    w, x = setting()
    found = PBLLM(salient=0.1, group_size="channel", metric=metric).compress(Dense.of(w), gram(x))
    assert isinstance(found, Sum)
    signs, integers = found.terms
    assert isinstance(signs, Binary)
    assert isinstance(integers, SparseInt)
    inverse = gptq.inverse(gptq.prepared(hessian(x).tolist(), 0.01, act_order=False)[0])
    score = {
        (i, j): abs(v) / (inverse[j][j] ** 0.5 if metric == "hessian" else 1)
        for i, row in enumerate(w.tolist())
        for j, v in enumerate(row)
    }
    expected = set(sorted(score, key=lambda at: -score[at])[: round(0.1 * OUT * IN)])
    assert {(i, j) for i, j in integers.survivors().nonzero().tolist()} == expected


def test_pb_llm_scales_are_weighted_means_of_what_is_not_salient() -> None:
    w, x = setting()
    found = PBLLM(salient=0.1, group_size=8, num_refits=0).compress(Dense.of(w), gram(x))
    assert isinstance(found, Sum)
    signs, integers = found.terms
    assert isinstance(signs, Binary)
    assert isinstance(integers, SparseInt)
    h = torch.diagonal(hessian(x)) * ~integers.survivors()
    for i in range(OUT):
        for g in range(IN // 8):
            part = slice(8 * g, 8 * g + 8)
            expected = reference.mean(w[i, part].abs().tolist(), h[i, part].tolist())
            assert float(signs.scale[i, g]) == pytest.approx(expected, rel=4e-3)


def test_pb_llm_more_salient_weights_and_refits_pay() -> None:
    w, x = setting(width=80)
    few, many = (compress(PBLLM(salient=share, group_size=16), w, x) for share in (0.1, 0.3))
    assert lost(many, w, x) < 0.7 * lost(few, w, x)
    assert many.bits_per_weight > few.bits_per_weight + 8 * 0.2
    assert lost(few, w, x) < lost(compress(PBLLM(group_size=16, num_refits=0), w, x), w, x)


def test_pb_llm_outliers_are_kept() -> None:
    w, x = setting()
    w[3, 5], w[7, 20] = 1000.0, -500.0
    found = compress(PBLLM(group_size=8), w, x).unpack(torch.float32)
    assert float(found[3, 5]) == pytest.approx(1000, rel=0.02)
    assert float(found[7, 20]) == pytest.approx(-500, rel=0.02)


def test_pb_llm_counts_signs_integers_positions_and_scales() -> None:
    w = gaussian(64, 256)
    found = PBLLM(salient=0.1, group_size=64).compress(Dense.of(w.to(HALF)), Gram.neutral(256))
    assert isinstance(found, Sum)
    integers = found.terms[1]
    assert isinstance(integers, SparseInt)
    assert integers.gaps is not None
    assert integers.count == round(0.1 * w.numel())
    assert found.nbytes == w.numel() // 8 + 64 * 4 * 2 + integers.count + 64 * 2 + integers.gaps.nbytes
    assert 2.7 < found.bits_per_weight - 16 / 64 - 16 / 256 + 0.4 < 2.8


# OneBit


def test_onebit_without_data_is_the_signs_and_the_first_singular_pair() -> None:
    w, _ = setting()
    found = OneBit(num_rounds=0).compress(Dense.of(w))
    assert isinstance(found, Binary)
    U, s, V = torch.linalg.svd(w.abs().double())
    expected = w.sign() * s[0] * torch.outer(U[:, 0], V[0])
    torch.testing.assert_close(found.unpack(torch.float32).double(), expected, rtol=1e-2, atol=1e-3)
    assert torch.equal(unpack_mask(found.signs, IN), w >= 0)
    assert found.nbytes == OUT * IN // 8 + 2 * (OUT + IN)


@pytest.mark.parametrize("act_order", [False, True])
def test_onebit_signs_are_the_papers_loop_over_columns(act_order: bool) -> None:
    w, x = setting()
    begin = OneBit(num_rounds=0).compress(Dense.of(w))
    found = OneBit(num_rounds=1, act_order=act_order).compress(Dense.of(w), gram(x))
    assert isinstance(found, Binary)
    size = begin.unpack(torch.float32).abs().double()

    def rounded(column: torch.Tensor, j: int) -> torch.Tensor:
        return torch.where(column >= 0, size[:, j], -size[:, j])

    loop = gptq.column_loop(w, hessian(x), rounded, act_order=act_order)
    differing = (unpack_mask(found.signs, IN) != (loop > 0)).any(1)
    assert int(differing.sum()) <= 2, "the loop's sizes are rounded to 16 bits, the method's not yet"


def test_onebit_fits_pay_and_feedback_pays_more() -> None:
    w, x = setting(width=80)
    plain, fitted, fed = (
        lost(compress(method, w, x), w, x) for method in (OneBit(num_rounds=0), OneBit(feedback=False), OneBit())
    )
    assert fitted < 0.9 * plain
    assert fed < 0.8 * fitted
    signs = compress(OneBit(feedback=False), w, x)
    assert isinstance(signs, Binary)
    assert torch.equal(unpack_mask(signs.signs, 80), w >= 0), "without feedback signs stay what they were"


# BiLLM


@pytest.mark.parametrize("width", [40, 32])
def test_billm_as_published_is_the_reference_block_by_block(width: int) -> None:
    w, x = setting(width=width)
    method = BiLLM(block_size=16, as_published=True, refit=False)
    found = method.compress(Dense.of(w), gram(x))
    assert isinstance(found, Binary)
    damped = torch.tensor(gptq.prepared(hessian(x).tolist(), 0.01, act_order=False)[0], dtype=torch.float64)
    U = torch.linalg.cholesky(torch.linalg.inv(damped)).T
    salient: list[int] = []

    def code(start: int, values: torch.Tensor) -> torch.Tensor:
        pivots = torch.diagonal(U)[start : start + values.shape[1]].tolist()
        coded, columns, _ = reference.billm_block(values, pivots, 0.4, HALF)
        salient.extend(start + j for j in columns)
        return coded

    expected = reference.blockwise(w, hessian(x), code, 16)
    assert found.salient is not None
    assert unpack_mask(found.salient, width).nonzero().squeeze(1).tolist() == salient
    differing = ((found.unpack(torch.float32).double() - expected).abs() > 2e-3).float().mean()
    assert float(differing) < 0.02, "sizes may round to the next bfloat16 and a size at the break-point change sides"


def test_billm_each_step_away_from_the_paper_pays() -> None:
    w, x = setting(width=128)
    published = BiLLM(block_size=64, as_published=True, refit=False)
    losses = [
        lost(compress(method, w, x), w, x)
        for method in (
            published,
            replace(published, refit=True),
            BiLLM(block_size=64, refit=False),
            BiLLM(block_size=64),
        )
    ]
    assert losses[1] < losses[0]
    assert losses[3] < losses[2] < losses[0]


@pytest.mark.parametrize("as_published", [True, False])
def test_billm_takes_two_bits_and_its_scales(as_published: bool) -> None:
    w, x = setting(width=128)
    found = compress(BiLLM(block_size=64, as_published=as_published), w.to(HALF), x)
    assert isinstance(found, Binary)
    assert found.planes == 2
    salient = 0 if found.salient is None else 128 // 8
    assert found.nbytes == OUT * 2 * 128 // 8 + 2 * 2 * OUT * found.scale.shape[1] + salient
    plain = compress(BiLLM(block_size=64, max_salient=0), w.to(HALF), x)
    assert plain.nbytes == OUT * (2 * 128 // 8 + 2 * 2 * 2)


# All of them


@EACH
def test_dense_float16_and_float32_store_sixteen_bit_scales(method: Method) -> None:
    w, x = setting()
    for dtype, stored in ((torch.float16, torch.float16), (HALF, HALF), (torch.float32, HALF)):
        found = compress(method, w.to(dtype), x)
        real = {t.dtype for t in found.tensors().values() if t.is_floating_point()}
        assert (found.dtype, real) == (dtype, {stored})


@EACH
@pytest.mark.parametrize("pruned", ["sparse", "masked"])
def test_what_is_pruned_stays_pruned_and_is_made_up_for(method: Method, pruned: str) -> None:
    w, x = setting()
    mask = some()
    w = w * mask
    found = compress(method, Sparse.of(w, mask) if pruned == "sparse" else Masked.of(Dense.of(w), mask), x)
    assert isinstance(found, Masked)
    assert torch.equal(found.survivors(), mask)
    assert not found.unpack()[~mask].any()
    naive = compress(method, w, x).unpack(torch.float32) * mask
    assert lost(found, w, x) <= output_error(naive - w, x) / output_error(w, x)


@pytest.mark.parametrize("method", CALIBRATED, ids=lambda m: type(m).__name__)
def test_a_pruned_entry_does_not_move_its_rows_scales(method: Method) -> None:
    """What stood where a mask is must not count, whether it is zero or not."""
    w, x = setting()
    mask = some()
    quiet, loud = (compress(method, Masked.of(Dense.of(v), mask), x) for v in (w * mask, torch.where(mask, w, 50.0)))
    assert torch.equal(quiet.unpack(), loud.unpack())


@EACH
def test_both_factors_of_a_low_rank_pair_are_coded(method: Method) -> None:
    w, x = gaussian(16, 8, seed=1), correlated(100, IN)
    pair = LowRank.of(Dense.of(w), Dense.of(gaussian(8, IN, seed=2)))
    found = compress(method, pair, x)
    assert isinstance(found, LowRank)
    kinds = {node.kind for node in found.walk()}
    assert kinds & {"Binary", "Ternary"}
    assert "Dense" not in kinds


@EACH
def test_what_is_quantized_already_is_refused(method: Method) -> None:
    w, x = setting()
    with pytest.raises(ValueError, match="cannot be applied to a GroupInt weight"):
        compress(method, RTN(group_size=8).compress(Dense.of(w)), x)
    with pytest.raises(ValueError, match=r"cannot be applied to a (Binary|Ternary|Sum)"):
        compress(method, compress(method, w, x), x)


@pytest.mark.parametrize("method", CALIBRATED, ids=lambda m: type(m).__name__)
def test_what_stood_in_a_dead_column_disturbs_nothing(method: Method) -> None:
    w, x = setting()
    x[:, [4, 30]] = 0
    loud = w.clone()
    loud[:, [4, 30]] = 50.0
    quiet = w.clone()
    quiet[:, [4, 30]] = 0
    alive = [j for j in range(IN) if j not in (4, 30)]
    found, expected = (compress(method, v, x).unpack()[:, alive] for v in (loud, quiet))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("method", [Ternary(group_size=8), OneBit()], ids=["Ternary", "OneBit"])
def test_calibration_pays_at_the_same_size(method: Ternary | OneBit) -> None:
    w, x = setting(width=80)
    with_data = compress(method, w, x)
    without = compress(OneBit(num_rounds=0) if isinstance(method, OneBit) else replace(method, feedback=False), w, x)
    assert with_data.nbytes == without.nbytes
    assert lost(with_data, w, x) < 0.7 * lost(without, w, x)


WRONG: list[tuple[type[Any], dict[str, Any]]] = [
    (Ternary, {"fit": "best"}), (Ternary, {"num_refits": -1}), (Ternary, {"damping": 0}), (Ternary, {"group_size": 0}),
    (Ternary, {"group_size": "row"}), (PBLLM, {"salient": 0}), (PBLLM, {"salient": 1}), (PBLLM, {"salient_bits": 9}),
    (PBLLM, {"metric": "w"}), (PBLLM, {"num_refits": -1}), (PBLLM, {"damping": 2}), (PBLLM, {"group_size": "tensor"}),
    (PBLLM, {"group_size": -8}), (OneBit, {"num_rounds": -1}), (OneBit, {"damping": 0}), (BiLLM, {"block_size": 0}),
    (BiLLM, {"max_salient": 1}), (BiLLM, {"max_salient": -0.1}), (BiLLM, {"damping": 0}),
]  # fmt: skip


@pytest.mark.parametrize(("cls", "wrong"), WRONG)
def test_impossible_settings_are_refused(cls: type[Any], wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        cls(**wrong)


@pytest.mark.parametrize("cls", [Ternary, PBLLM])
def test_a_group_size_that_does_not_divide_is_refused_while_planning(cls: type[Any]) -> None:
    with pytest.raises(ValueError, match="group_size 64 does not divide 96"):
        cls().check((10, 96))

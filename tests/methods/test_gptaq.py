"""GPTAQ against optimal brain quantization that sends on what the other inputs ask for, in float64."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from decoct.engine import stages
from decoct.engine.plan import Plan, make_plan
from decoct.methods.quantize.gptaq import GPTAQ
from decoct.methods.quantize.gptq import GPTQ
from decoct.stats import Gram, PairedGram
from decoct.weights import Dense, GroupInt
from tests.engine.running import RTN, digests, make_base, run
from tests.methods.test_gptq import check_codes, reference_grids
from tests.reference import gptq as reference
from tests.reference.inputs import correlated, gaussian, hessian

OUT, IN = 16, 40


def setting() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A matrix, its inputs, and what the uncompressed model has in their place."""
    x = correlated(3 * IN, IN)
    return gaussian(OUT, IN, seed=7), x, x + 0.1 * correlated(3 * IN, IN, seed=5)


def paired(x: torch.Tensor, original: torch.Tensor) -> PairedGram:
    stat = PairedGram.empty(x.shape[1])
    stat.add_pair(x, original)
    return stat


def wanted_error(weight: torch.Tensor, w: torch.Tensor, x: torch.Tensor, original: torch.Tensor) -> float:
    """Squared distance to the outputs of the uncompressed model."""
    return float((x.double() @ weight.double().T - original.double() @ w.double().T).square().sum())


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("alpha", [0.25, 1.0])
def test_codes_are_the_references(alpha: float, act_order: bool) -> None:
    w, x, original = setting()
    method = GPTAQ(bits=3, group_size=8, alpha=alpha, act_order=act_order)
    weight = method.compress(Dense.of(w), paired(x, original))
    assert isinstance(weight, GroupInt)
    moved = 2.0 * alpha / x.shape[0] * (original - x).double().T @ x.double()
    grid = weight.grid()
    expected = reference.obq(
        w.tolist(), hessian(x).tolist(), reference_grids(grid), act_order=act_order, moved=moved.tolist()
    )
    check_codes(weight.unpack_codes(), expected, grid, w, x)


def test_nothing_to_make_up_for_is_gptq() -> None:
    w, x, original = setting()
    plain = GPTQ(bits=3, group_size=8).compress(Dense.of(w), paired(x, x).gram)
    for method, stat in (
        (GPTAQ(bits=3, group_size=8, alpha=0.0), paired(x, original)),
        (GPTAQ(bits=3, group_size=8), paired(x, x)),
    ):
        assert torch.equal(method.compress(Dense.of(w), stat).unpack(), plain.unpack())


def test_outputs_come_nearer_to_the_uncompressed_models() -> None:
    w, x, _ = setting()
    original = x + 0.2 * x.roll(1, dims=1)  # a change that the inputs as they are can tell
    stat = paired(x, original)
    plain = GPTQ(bits=4, group_size=8).compress(Dense.of(w), stat.gram).unpack()
    made = GPTAQ(bits=4, group_size=8, alpha=1.0).compress(Dense.of(w), stat).unpack()
    assert wanted_error(made, w, x, original) < 0.5 * wanted_error(plain, w, x, original)


def test_statistics_add_up_and_follow_scales_and_factors() -> None:
    _, x, original = setting()
    whole = paired(x, original)
    halves = paired(x[:50], original[:50]).merge(paired(x[50:], original[50:]))
    torch.testing.assert_close(whole.cross, halves.cross, rtol=1e-4, atol=1e-3)
    factor, right = torch.rand(IN) + 0.5, gaussian(6, IN)
    scaled, through = whole.scaled(factor), whole.through(right)
    torch.testing.assert_close(scaled.cross, paired(x * factor, original * factor).cross, rtol=1e-4, atol=1e-3)
    expected = paired(x @ right.T, original @ right.T)
    torch.testing.assert_close(through.cross, expected.cross, rtol=1e-3, atol=1e-1)
    torch.testing.assert_close(through.gram.matrix(), expected.gram.matrix(), rtol=1e-3, atol=1e-2)


STEP = {"linear": {"gptaq": {"bits": 3, "group_size": 8}}}


def test_the_first_block_is_gptqs_and_later_ones_are_not(tmp_path: Path) -> None:
    """Before anything is compressed both models feed a layer the same; after it they do not."""
    base = make_base(tmp_path, "llama")
    mine = run(base, tmp_path / "gptaq", STEP)
    plain = run(base, tmp_path / "gptq", {"linear": {"gptq": {"bits": 3, "group_size": 8}}})
    assert mine.errors["block 0"] == plain.errors["block 0"]
    assert mine.errors["block 1"] != plain.errors["block 1"]
    assert mine.nbytes == plain.nbytes


def test_on_disk_and_in_memory_are_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base(tmp_path, "llama")
    roomy = run(base, tmp_path / "roomy", STEP)

    def on_disk(*args: Any, **kwargs: Any) -> Plan:
        return replace(make_plan(*args, **kwargs), in_memory=False)

    monkeypatch.setattr(stages, "make_plan", on_disk)
    assert digests(run(base, tmp_path / "tight", STEP).folder) == digests(roomy.folder)


def test_experts_are_refused_while_planning(tmp_path: Path) -> None:
    base = make_base(tmp_path, "mixtral")
    with pytest.raises(ValueError, match=r"route a token differently; give experts another method"):
        run(base, tmp_path / "out", STEP)
    rules = {
        "linear": [{"match": "attn.*", "gptaq": {"bits": 4, "group_size": 8}}, {"match": "moe.*", **RTN["linear"]}]
    }
    assert run(base, tmp_path / "out", rules).errors


def test_a_stat_without_pairs_is_a_plain_gram() -> None:
    _, x, _ = setting()
    stat = PairedGram.empty(IN)
    stat.add(x)
    plain = Gram.empty(IN)
    plain.add(x)
    assert torch.equal(stat.gram.total, plain.total)
    assert not bool(stat.cross.any())

"""Guided statistics against float64 sums, and what becomes of a method that works on groups of rows."""

from typing import Any

import pytest
import torch

from decoct.methods import METHODS, LinearMethod
from decoct.methods.guided import ByGroup, GroupedMoments, Guided, group_means, row_groups
from decoct.methods.quantize.gptaq import GPTAQ
from decoct.methods.quantize.gptq import GPTQ
from decoct.stats import Gram, PairedGram
from decoct.weights import (
    Dense,
    GroupInt,
    LowRank,
    Masked,
    QuantizedInput,
    Rotated,
    Sparse,
    Stacked,
    Weight,
    describe,
    rebuild,
)
from tests.reference import guided as reference
from tests.reference.inputs import correlated, gaussian
from tests.weights.samples import quantized_input

OUT, IN, TOKENS = 24, 32, 120


def setting() -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs, and gradients of which some tokens have much larger ones."""
    gradient = gaussian(TOKENS, OUT, seed=1) * gaussian(TOKENS, 1, seed=2).exp()
    return correlated(TOKENS, IN, 0), gradient


def statistic(kind: ByGroup, x: torch.Tensor, gradient: torch.Tensor, *others: torch.Tensor) -> GroupedMoments:
    stat = kind.empty(x.shape[1])
    weights = group_means(gradient.square(), kind.groups)
    for start in range(0, len(x), 50):
        part = slice(start, start + 50)
        stat.add_weighted(x[part], weights[part], *(other[part] for other in others))
    return stat


def gram(x: torch.Tensor) -> Gram:
    stat = Gram.empty(x.shape[1])
    stat.add(x)
    return stat


@pytest.mark.parametrize("groups", [1, 4, 5, OUT])
def test_each_group_has_its_weighted_gram(groups: int) -> None:
    x, gradient = setting()
    weights = reference.token_weights(gradient, groups)
    torch.testing.assert_close(group_means(gradient.square(), groups), torch.tensor(weights), rtol=1e-5, atol=0)
    stat = statistic(ByGroup(Gram, groups), x, gradient)
    assert stat.num_tokens == TOKENS
    for group in range(groups):
        found = stat.of_group(group)
        assert isinstance(found, Gram)
        expected = reference.weighted_hessian(x, [each[group] for each in weights])
        torch.testing.assert_close(found.matrix(torch.float64), expected, rtol=1e-4, atol=1e-5)


def test_pairs_are_weighted_too() -> None:
    x, gradient = setting()
    original = x + 0.1 * gaussian(TOKENS, IN, seed=3)
    stat = statistic(ByGroup(PairedGram, 2), x, gradient, original)
    weights = reference.token_weights(gradient, 2)
    for group in range(2):
        found, mine = stat.of_group(group), [each[group] for each in weights]
        assert isinstance(found, PairedGram)
        torch.testing.assert_close(
            found.gram.matrix(torch.float64), reference.weighted_hessian(x, mine), rtol=1e-4, atol=1e-5
        )
        expected = reference.weighted_cross(x, original, mine)
        torch.testing.assert_close(found.cross.double(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", [Gram, PairedGram])
def test_parts_merge_and_follow_changes_of_basis(kind: Any) -> None:
    x, gradient = setting()
    by = ByGroup(kind, 3)
    whole, first, second = (statistic(by, x[p], gradient[p]) for p in (slice(None), slice(70), slice(70, None)))
    factor = gaussian(IN, seed=4).abs() + 0.5
    cases = [(first.merge(second), whole), (whole.scaled(factor), statistic(by, x * factor, gradient))]
    turned = statistic(by, torch.eye(IN), torch.ones(IN, OUT)).rotated()  # H·Hᵀ
    cases.append((turned, statistic(by, torch.eye(IN), torch.ones(IN, OUT))))
    for found, expected in cases:
        for group in range(3):
            mine, theirs = found.of_group(group), expected.of_group(group)
            grams = [each if isinstance(each, Gram) else each.gram for each in (mine, theirs)]
            torch.testing.assert_close(grams[0].matrix(), grams[1].matrix(), rtol=1e-4, atol=1e-4)


def test_outputs_that_nothing_reads_get_a_neutral_statistic() -> None:
    x, gradient = setting()
    gradient[:, : OUT // 2] = 0
    found = statistic(ByGroup(Gram, 2), x, gradient).of_group(0)
    assert isinstance(found, Gram)
    torch.testing.assert_close(found.matrix(), 2 * torch.eye(IN))
    assert torch.isfinite(Guided(method=GPTQ(group_size=8), groups=2).compress(
        Dense.of(gaussian(OUT, IN)), statistic(ByGroup(Gram, 2), x, gradient)
    ).unpack()).all()  # fmt: skip


def test_groups_cover_all_rows() -> None:
    for out, groups in ((24, 4), (7, 3), (5, 5)):
        rows = [row for part in row_groups(out, groups) for row in range(out)[part]]
        assert rows == list(range(out))


@pytest.mark.parametrize("groups", [1, 4, 5])
def test_tokens_that_weigh_the_same_change_nothing(groups: int) -> None:
    """Only rows of one group share a grid search and a factorization; both are the same for all groups here."""
    x, _ = setting()
    method, weight = GPTQ(bits=3, group_size=8), Dense.of(gaussian(OUT, IN, seed=5))
    stat = statistic(ByGroup(Gram, groups), x, torch.full((TOKENS, OUT), 0.25))
    found = Guided(method=method, groups=groups).compress(weight, stat)
    assert isinstance(found, GroupInt)
    plain = method.compress(weight, gram(x))
    assert describe(found) == describe(plain)
    assert float((found.unpack() != plain.unpack()).float().mean()) < 0.01


def test_each_group_is_the_method_with_that_groups_statistic() -> None:
    x, gradient = setting()
    method, weight = GPTQ(bits=3, group_size=8), Dense.of(gaussian(OUT, IN, seed=5))
    stat = statistic(ByGroup(Gram, 4), x, gradient)
    found = Guided(method=method, groups=4).compress(weight, stat).unpack()
    for group, rows in enumerate(row_groups(OUT, 4)):
        mine = stat.of_group(group)
        assert isinstance(mine, Gram)
        torch.testing.assert_close(found[rows], method.compress(Dense.of(weight.values[rows]), mine).unpack())
    assert (found != method.compress(weight, gram(x)).unpack()).any()


def weighted_error(change: torch.Tensor, groups: int) -> float:
    """What guided minimises: Σ over tokens and outputs of c·(change of the output)²."""
    x, gradient = setting()
    return float((group_means((x @ change.T).square(), groups) * group_means(gradient.square(), groups)).sum())


def test_the_weighted_error_is_less_than_without() -> None:
    x, gradient = setting()
    method = GPTQ(bits=4, group_size=8, clip_search=False)
    stat = statistic(ByGroup(Gram, 4), x, gradient)
    guided, plain = 0.0, 0.0
    for seed in range(3):
        weight = Dense.of(gaussian(OUT, IN, seed=seed))
        guided += weighted_error(Guided(method=method, groups=4).compress(weight, stat).unpack() - weight.values, 4)
        plain += weighted_error(method.compress(weight, gram(x)).unpack() - weight.values, 4)
    assert guided < 0.8 * plain


def all_guided() -> dict[str, LinearMethod]:
    found = {}
    settings: dict[str, dict[str, Any]] = {"gptq": {"group_size": 8}, "gptaq": {"group_size": 8}}
    settings |= {"awq_clip": {"group_size": 8}, "spqr": {"group_size": 8}, "owq": {"group_size": 8}}
    settings |= {"qtip": {"state_bits": 8}, "billm": {"block_size": 8}, "pb_llm": {"group_size": 8}}
    settings |= {"ternary": {"group_size": 8}}
    for name, cls in METHODS.items():
        if issubclass(cls, LinearMethod) and name != "svd_llm":
            method = cls(**settings.get(name, {}))
            if method.stat in (Gram, PairedGram):
                found[name] = method
    return found


@pytest.mark.parametrize("name", all_guided())
def test_every_method_with_such_a_statistic(name: str) -> None:
    x, gradient = setting()
    guided = Guided(method=all_guided()[name], groups=3)
    guided.check((OUT, IN))
    assert guided.workspace((OUT, IN)) > 0
    assert guided.operations((OUT, IN)) > 0
    others = (x,) if guided.stat.kind is PairedGram else ()
    stat = statistic(guided.stat, x, gradient, *others)
    made = guided.compress(Dense.of(gaussian(OUT, IN, seed=5)), stat)
    assert made.shape == (OUT, IN)
    again = rebuild(describe(made), made.tensors())
    torch.testing.assert_close(again.unpack(), made.unpack(), rtol=0, atol=0)
    weight = gaussian(OUT, IN, seed=5)
    assert weighted_error(made.unpack() - weight, 3) < 0.9 * weighted_error(weight, 3)


def given(kind: str) -> Weight:
    w = gaussian(OUT, IN, seed=5)
    keep = gaussian(OUT, IN, seed=6).abs() > 0.7
    dense = Dense.of(w)
    return {
        "masked": Masked.of(Dense.of(w), keep),
        "sparse": Sparse.of(w, keep),
        "inputs": quantized_input(dense),
        "rotated": Rotated.of(dense, None, torch.ones(IN)),
    }[kind]


@pytest.mark.parametrize("kind", ["masked", "sparse", "inputs", "rotated"])
def test_what_earlier_steps_made_is_kept(kind: str) -> None:
    x, gradient = setting()
    before = given(kind)
    stat = statistic(ByGroup(Gram, 3), x, gradient)
    after = Guided(method=GPTQ(bits=4, group_size=8), groups=3).compress(before, stat)
    expected = {"masked": Masked, "sparse": Masked, "inputs": QuantizedInput, "rotated": Rotated}[kind]
    assert isinstance(after, expected)
    assert not any(isinstance(node, Stacked) for node in after.walk())
    zero = before.unpack() == 0
    assert (after.unpack()[zero] == 0).all()
    assert float((after.unpack() - before.unpack()).square().mean()) < 0.05


def test_refusals() -> None:
    with pytest.raises(ValueError, match="does not use; leave guided out"):
        Guided(method=METHODS["rtn"](), groups=4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 1, not 0"):
        Guided(method=GPTQ(), groups=0)
    with pytest.raises(ValueError, match="4 groups need as many output features, not 3"):
        Guided(method=GPTQ(group_size=8), groups=4).check((3, 8))
    with pytest.raises(ValueError, match="a factorization cannot follow"):
        Guided(method=METHODS["svd_llm"](), groups=2).check((64, 64))  # type: ignore[arg-type]
    x, gradient = setting()
    low = LowRank.of(Dense.of(gaussian(OUT, 4)), Dense.of(gaussian(4, IN)))
    with pytest.raises(ValueError, match=r"guided cannot be applied to a LowRank\(Dense, Dense\) weight"):
        Guided(method=GPTQ(group_size=8), groups=2).compress(low, statistic(ByGroup(Gram, 2), x, gradient))
    assert Guided(method=GPTAQ(), groups=2).stat == ByGroup(PairedGram, 2)

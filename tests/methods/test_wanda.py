"""Wanda against its definition, and what quantizing a pruned weight keeps."""

from typing import Any

import pytest
import torch

from decoct.methods.prune.wanda import Wanda, wanda_score
from decoct.methods.quantize.gptq import GPTQ
from decoct.methods.quantize.rtn import RTN
from decoct.ops.sparsity import Pattern
from decoct.stats import ColumnNorm, Gram
from decoct.weights import Dense, GroupInt, Masked, Sparse
from tests.reference import wanda as reference
from tests.reference.inputs import correlated, gaussian

OUT, IN = 12, 32


def norms(x: torch.Tensor) -> ColumnNorm:
    stat = ColumnNorm.empty(x.shape[1])
    stat.add(x)
    return stat


@pytest.mark.parametrize("sparsity", [0.05, 0.3, 0.5, 0.9])
def test_mask_is_the_references_row_by_row(sparsity: float) -> None:
    w, x = gaussian(OUT, IN), correlated(50, IN)
    weight = Wanda(sparsity=sparsity).compress(Dense.of(w), norms(x))
    assert isinstance(weight, Sparse)
    expected = torch.tensor(reference.survivors(w.tolist(), x.double().tolist(), round(sparsity * IN)))
    assert torch.equal(weight.survivors(), expected)
    assert torch.equal(weight.unpack(), w * expected)
    assert expected.sum(1).unique().numel() == 1


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 2), (3, 16)])
def test_patterns_keep_n_of_every_m(n: int, m: int) -> None:
    w, x = gaussian(OUT, IN), correlated(50, IN)
    weight = Wanda(n=n, m=m).compress(Dense.of(w), norms(x))
    assert isinstance(weight, Sparse)
    expected = torch.tensor(reference.survivors(w.tolist(), x.double().tolist(), m - n, m))
    assert torch.equal(weight.survivors(), expected)
    assert (expected.reshape(OUT, -1, m).sum(-1) == n).all()


def test_ties_drop_the_earlier_entries() -> None:
    mask = Pattern(3, 8).survivors(wanda_score(torch.ones(2, 8), torch.ones(8)))
    assert mask.tolist() == [[False] * 3 + [True] * 5] * 2
    assert mask.tolist() == reference.survivors([[1.0] * 8] * 2, [[1.0] * 8], 3)


def test_inputs_decide_as_much_as_weights() -> None:
    w = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    score = wanda_score(w, torch.tensor([9.0, 1.0, 1.0, 1.0]))
    assert Pattern(2, 4).survivors(score).tolist() == [[True, False, False, True]]


def test_a_pruned_weight_pruned_further_only_loses_entries() -> None:
    w, x = gaussian(OUT, IN), correlated(50, IN)
    half = Wanda(sparsity=0.5).compress(Dense.of(w), norms(x))
    assert isinstance(half, Sparse)
    for sparsity, left in ((0.25, 16), (0.75, 8)):
        again = Wanda(sparsity=sparsity).compress(half, norms(x))
        assert isinstance(again, Sparse)
        assert not (again.survivors() & ~half.survivors()).any()
        assert again.survivors().sum(1).tolist() == [left] * OUT


def test_a_quantized_weight_stays_quantized() -> None:
    w, x = gaussian(OUT, IN), correlated(50, IN)
    quantized = RTN(bits=4, group_size=16).compress(Dense.of(w))
    pruned = Wanda().compress(quantized, norms(x))
    assert isinstance(pruned, Masked)
    assert pruned.inner is quantized
    assert torch.equal(pruned.unpack(), quantized.unpack() * pruned.survivors())
    assert (pruned.unpack() == 0).sum(1).min() >= IN // 2
    for sparsity in (0.25, 0.75):
        again = Wanda(sparsity=sparsity).compress(pruned, norms(x))
        assert isinstance(again, Masked)
        assert not (again.survivors() & ~pruned.survivors()).any()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("wanda", [Wanda(sparsity=0.5), Wanda(n=2, m=4)], ids=["unstructured", "2:4"])
def test_half_pruned_then_four_bits_keeps_every_zero(wanda: Wanda, symmetric: bool) -> None:
    w, x = gaussian(OUT, IN), correlated(50, IN)
    gram = Gram.empty(IN)
    gram.add(x)
    pruned = wanda.compress(Dense.of(w), norms(x))
    assert isinstance(pruned, Sparse)
    weight = GPTQ(bits=4, group_size=16, symmetric=symmetric).compress(pruned, gram)
    assert isinstance(weight, Masked)
    assert isinstance(weight.inner, GroupInt)
    zero_before, zero_after = (pruned.unpack() == 0).tolist(), (weight.unpack() == 0).tolist()
    for i in range(OUT):
        for j in range(IN):
            assert zero_after[i][j] or not zero_before[i][j], f"entry {i}, {j} came back"
    assert float((weight.unpack() != 0).float().mean()) > 0.4, "survivors are still there"


@pytest.mark.parametrize(
    "wrong", [{"sparsity": 0}, {"sparsity": 1.0}, {"n": 2}, {"m": 4}, {"n": 4, "m": 4}, {"n": 0, "m": 4}]
)
def test_impossible_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Wanda(**wrong)


def test_a_pattern_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="a pattern of 2:4 does not divide 30 input features"):
        Wanda(n=2, m=4).compress(Dense.of(gaussian(4, 30)), ColumnNorm.neutral(30))

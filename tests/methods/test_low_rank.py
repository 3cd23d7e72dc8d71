"""SVD-LLM and EoRA: optimal for the layer's inputs, and composable with quantizers."""

import pytest
import torch

from decoct.methods.factorize.eora import EoRA
from decoct.methods.factorize.svd_llm import SVDLLM, rank_for
from decoct.methods.quantize.gptq import GPTQ
from decoct.methods.quantize.rtn import RTN
from decoct.stats import Gram
from decoct.weights import Dense, GroupInt, LowRank, Sum
from tests.reference import low_rank as reference
from tests.reference.inputs import correlated, gaussian, hessian, output_error

SHAPES = [(24, 40), (40, 24), (32, 32)]


def gram(x: torch.Tensor) -> Gram:
    stat = Gram.empty(x.shape[1])
    stat.add(x)
    return stat


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("keep", [0.2, 0.5, 0.9])
def test_svd_llm_is_optimal_and_keeps_what_it_says(shape: tuple[int, int], keep: float) -> None:
    w, x = gaussian(*shape), correlated(3 * shape[1], shape[1])
    weight = SVDLLM(keep=keep).compress(Dense.of(w), gram(x))
    assert isinstance(weight, LowRank)
    assert weight.rank == int(keep * shape[0] * shape[1] / sum(shape))
    assert weight.nbytes <= keep * w.nbytes
    assert SVDLLM(keep=keep).leaves(shape) == (weight.left.shape, weight.right.shape)
    _, least = reference.svd_llm(w, hessian(x), weight.rank)
    assert reference.error(weight.unpack() - w, hessian(x)) <= least * (1 + 1e-3)


def test_svd_llm_beats_a_plain_svd_where_it_counts() -> None:
    w, x = gaussian(32, 32), correlated(96, 32)
    weight = SVDLLM(keep=0.5).compress(Dense.of(w), gram(x))
    plain = SVDLLM(keep=0.5).compress(Dense.of(w), Gram.neutral(32))
    assert output_error(weight.unpack() - w, x) < 0.7 * output_error(plain.unpack() - w, x)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("multiple", [1, 4, 8])
def test_rank_is_the_largest_multiple_within_the_budget(shape: tuple[int, int], multiple: int) -> None:
    for keep in (0.05, 0.3, 0.62, 0.99):
        rank = rank_for(shape, keep, multiple)
        assert rank % multiple == 0
        assert rank * sum(shape) <= keep * shape[0] * shape[1] or rank == multiple
        assert (rank + multiple) * sum(shape) > keep * shape[0] * shape[1]


def test_a_rank_multiple_that_saves_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="rank_multiple 32 is too large for a 32x32 matrix"):
        SVDLLM(rank_multiple=32).check((32, 32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_factorized_then_eight_bits_is_a_product_of_integers(dtype: torch.dtype, symmetric: bool) -> None:
    w, x = gaussian(48, 64).to(dtype), correlated(200, 64)
    factors = SVDLLM(keep=0.8, rank_multiple=16).compress(Dense.of(w), gram(x))
    weight = RTN(bits=8, group_size=16, symmetric=symmetric).compress(factors)
    assert isinstance(weight, LowRank)
    assert isinstance(weight.left, GroupInt)
    assert isinstance(weight.right, GroupInt)
    assert weight.rank == 16
    assert weight.dtype == dtype
    assert output_error(weight.unpack(torch.float32) - factors.unpack(torch.float32), x) < 1e-3 * output_error(w, x)
    assert weight.nbytes < 0.6 * factors.nbytes


def test_gptq_of_factors_gives_the_left_one_what_the_right_one_puts_out() -> None:
    """Factors that are not whitened: those of SVD-LLM put out features that are uncorrelated already."""
    x, left, right = correlated(200, 64), gaussian(48, 16, seed=4), gaussian(16, 64, seed=5)
    method = GPTQ(bits=3, group_size=16)
    weight = method.compress(LowRank.of(Dense.of(left), Dense.of(right)), gram(x))
    assert isinstance(weight, LowRank)
    new_right = method.compress(Dense.of(right), gram(x))
    new_left = method.compress(Dense.of(left), gram(x @ new_right.unpack().T))
    assert torch.equal(weight.right.unpack(), new_right.unpack())
    differing = (weight.left.unpack() != new_left.unpack()).any(1)  # one row for a tie, as in test_gptq
    assert int(differing.sum()) <= 1
    nearest = RTN(bits=3, group_size=16).compress(LowRank.of(Dense.of(left), Dense.of(right)))
    assert output_error(weight.unpack() - left @ right, x) < 0.8 * output_error(nearest.unpack() - left @ right, x)


@pytest.mark.parametrize("shape", SHAPES)
def test_eora_is_the_optimum_of_its_rank(shape: tuple[int, int]) -> None:
    w, x = gaussian(*shape), correlated(3 * shape[1], shape[1])
    rounded = RTN(bits=2, group_size=8).compress(Dense.of(w))
    lost = w - rounded.unpack()
    for rank in (1, 6, 20):
        weight = EoRA(rank=rank).correct(rounded, gram(x), Dense.of(w))
        assert isinstance(weight, Sum)
        term = weight.terms[1]
        assert isinstance(term, LowRank)
        assert term.rank == rank
        best, least = reference.eora(lost, hessian(x), rank)
        assert reference.error(w - weight.unpack(), hessian(x)) <= least * (1 + 1e-3)
        assert reference.error(best - term.unpack(), hessian(x)) <= 1e-2 * least


def test_three_bits_then_eora_is_a_sum_with_less_error() -> None:
    w, x = gaussian(48, 64).bfloat16(), correlated(200, 64)
    quantized = GPTQ(bits=3, group_size=32).compress(Dense.of(w), gram(x))
    weight = EoRA(rank=16).correct(quantized, gram(x), Dense.of(w))
    assert isinstance(weight, Sum)
    assert [type(term) for term in weight.terms] == [GroupInt, LowRank]
    assert weight.terms[0] is quantized
    assert weight.dtype == torch.bfloat16
    errors = [output_error(v.unpack(torch.float32) - w.float(), x) for v in (quantized, weight)]
    assert errors[1] < 0.5 * errors[0]
    assert weight.nbytes == quantized.nbytes + 2 * 16 * (48 + 64)


def test_eora_of_a_loss_of_nothing_adds_nothing() -> None:
    w, x = gaussian(24, 40), correlated(99, 40)
    for shape in ((24, 40), (40, 24)):
        v, y = w.reshape(shape), x[:, : shape[1]]
        assert torch.equal(EoRA(rank=4).correct(Dense.of(v), gram(y), Dense.of(v)).unpack(), v)


def test_impossible_settings_are_refused() -> None:
    for keep in (0.0, 1.0, -1.0):
        with pytest.raises(ValueError, match="keep must lie between 0 and 1"):
            SVDLLM(keep=keep)
    with pytest.raises(ValueError, match="rank must be at least 1"):
        EoRA(rank=0)
    with pytest.raises(ValueError, match="rank 16 is more than a 8x64 matrix has; at most 8"):
        EoRA(rank=16).check((8, 64))

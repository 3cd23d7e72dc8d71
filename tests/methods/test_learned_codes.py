"""FlexRound, LRQ, OmniQuant and Block-AP on one matrix: formulas, where they start, and what they can reach."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from decoct.methods import METHODS
from decoct.methods.block_learning import BlockLearning
from decoct.methods.learned_division import Division
from decoct.methods.quantize.block_ap import BlockAP
from decoct.methods.quantize.flexround import FlexRound
from decoct.methods.quantize.gptq import GPTQ
from decoct.methods.quantize.lrq import LRQ
from decoct.methods.quantize.omniquant import OmniQuant
from decoct.methods.quantize.rtn import RTN
from decoct.stats import Gram
from decoct.weights import Dense, GroupInt
from tests.reference.inputs import correlated, gaussian

OUT, IN, BITS = 12, 32, 3
LEARNERS = [cls for cls in METHODS.values() if issubclass(cls, BlockLearning)]
EVERY = pytest.mark.parametrize("cls", LEARNERS, ids=lambda cls: cls.__name__)
EVERY_NEW = pytest.mark.parametrize("cls", [FlexRound, LRQ, OmniQuant, BlockAP], ids=lambda cls: cls.__name__)


def matrix(seed: int = 0) -> Tensor:
    return gaussian(OUT, IN, seed=seed) / IN**0.5


def rounded(w: Tensor, *, symmetric: bool = True, group_size: int | str = 8) -> GroupInt:
    found = RTN(bits=BITS, group_size=group_size, symmetric=symmetric).compress(Dense.of(w), None)
    assert isinstance(found, GroupInt)
    return found


def by_gptq(w: Tensor, *, symmetric: bool = True) -> GroupInt:
    stat = Gram.empty(IN)
    stat.add(correlated(256, IN))
    found = GPTQ(bits=BITS, group_size=8, symmetric=symmetric).compress(Dense.of(w), stat)
    assert isinstance(found, GroupInt)
    return found


STARTS: dict[str, Callable[[Tensor], GroupInt]] = {
    "rounded": rounded,
    "with zero points": lambda w: rounded(w, symmetric=False),
    "by rows": lambda w: rounded(w, group_size="channel"),
    "one scale": lambda w: rounded(w, group_size="tensor"),
    "one scale, with a zero point": lambda w: rounded(w, group_size="tensor", symmetric=False),
    "gptq": by_gptq,
    "gptq with zero points": lambda w: by_gptq(w, symmetric=False),
}


@EVERY
@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS.keys())
def test_learning_starts_from_the_codes_that_are_there(
    cls: type[BlockLearning], start: Callable[[Tensor], GroupInt]
) -> None:
    w = matrix()
    begun = start(w)
    latent = cls().latent(begun, w)
    unpacked = begun.unpack(torch.float32)
    same = torch.isclose(latent.values(), unpacked, rtol=1e-2, atol=1e-3)
    assert same.float().mean() >= (0.95 if cls is OmniQuant else 1.0), "OmniQuant's grid may begin one ulp aside"
    assert latent.weight().nbytes == begun.nbytes


@EVERY
@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS.keys())
def test_what_is_packed_is_what_was_learned_with(cls: type[BlockLearning], start: Callable[[Tensor], GroupInt]) -> None:
    w = matrix()
    latent = cls().latent(start(w), w)
    for step in range(5):
        latent.move(gaussian(OUT, IN, seed=step), 0.1)
    assert torch.equal(latent.weight().unpack(torch.float32), latent.values())


@EVERY
def test_a_gradient_makes_the_matrix_follow(cls: type[BlockLearning]) -> None:
    """The gradient of ½‖Ŵ - T‖² moves the values towards T, which is not where they started."""
    w = matrix()
    target = 0.7 * w + 0.3 * matrix(seed=5)
    method = cls(num_steps=60)
    latent = method.latent(rounded(w, symmetric=False), w)
    before = float((latent.values() - target).square().sum())
    for step in range(60):
        latent.move(latent.values() - target, method.rate(step))
    assert float((latent.values() - target).square().sum()) < 0.9 * before


def test_block_ap_moves_a_zero_point() -> None:
    """All weights of a group lie on one side: its zero point has to go to the end of the grid."""
    w = matrix().abs() + 0.2
    begun = rounded(w - w.mean(), symmetric=False)
    latent = BlockAP(num_steps=200).latent(begun, w - w.mean())
    for step in range(200):
        latent.move(latent.values() - w, BlockAP(num_steps=200, learning_rate=0.05).rate(step))
    assert int(latent.weight().grid().zero.sum()) < 0.5 * int(begun.grid().zero.sum())  # type: ignore[union-attr]
    assert float((latent.values() - w).square().mean()) < 0.4 * float((begun.unpack() - w).square().mean())


def divided(latent: Division, w: Tensor, log_divisor: Tensor) -> Tensor:
    """scale · clip(round(w / (scale · exp(log_divisor)))) in float64."""
    begun = latent.begun
    scale = begun.stored(begun.scale * latent.learned["scale"].exp()).double()
    quotient = w.double().reshape(begun.shape) / (scale * log_divisor.double().exp())
    return (scale * quotient.round().clamp(-(2 ** (BITS - 1)), 2 ** (BITS - 1) - 1)).reshape(w.shape)


@pytest.mark.parametrize("cls", [FlexRound, LRQ])
def test_divisors_against_the_formula(cls: type[FlexRound | LRQ]) -> None:
    w = matrix()
    latent = cls().latent(rounded(w), w)
    assert isinstance(latent, Division)
    for number, name in enumerate(latent.learned):
        latent.learned[name] = 0.2 * gaussian(*latent.learned[name].shape, seed=20 + number)
    leaves = {name: tensor.double().requires_grad_() for name, tensor in latent.learned.items() if name != "scale"}
    if cls is FlexRound:
        exact = leaves["entries"] + leaves["rows"]
    else:
        exact = (leaves["L"] @ leaves["U"] + leaves["r"] + leaves["c"]).reshape(latent.begun.shape)
    assert torch.allclose(latent.values().double(), divided(latent, w, exact.detach()), atol=1e-6)
    g = gaussian(*latent.begun.shape, seed=3)
    expected = torch.autograd.grad((g.double() * exact).sum(), list(leaves.values()))
    found = latent.pull(g)
    assert found.keys() == leaves.keys()
    for name, exact_gradient in zip(leaves, expected, strict=True):
        assert torch.allclose(found[name].double(), exact_gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("rank", "expected"), [(None, 3), (2, 2), (6, 6)])
def test_rank_fits_the_matrix(rank: int | None, expected: int) -> None:
    w = matrix()
    latent = LRQ(rank=rank).latent(rounded(w), w)
    assert isinstance(latent, Division)
    assert latent.learned["L"].shape == (OUT, expected)


def test_a_rank_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="rank"):
        LRQ(rank=0)


@EVERY_NEW
def test_learning_takes_what_it_says(cls: type[BlockLearning]) -> None:
    """More steps, sequences and entries are more work; what is learned is counted in memory."""
    method = cls(num_steps=10)
    assert cls(num_steps=20).operations(1000, 8, 64) > 1.2 * method.operations(1000, 8, 64)
    looked_at = [method.operations(1000, count, 64) for count in (16, 32, 128)]
    assert looked_at[0] < looked_at[1] == looked_at[2], (
        "the error is measured on some sequences, however many there are"
    )
    assert method.workspace(2000, 10) > 1.9 * method.workspace(1000, 10)
    w = gaussian(64, 64)
    latent = method.latent(rounded(w), w)
    latent.move(gaussian(64, 64, seed=1), 0.1)
    held = {id(tensor): tensor.nbytes for tensor in tensors(latent)}
    assert sum(held.values()) <= 1.4 * cls.state_bytes * w.numel(), "scales of groups of 8 are counted too"


def tensors(thing: object) -> list[Tensor]:
    """Every float tensor that an object holds, itself or in what it holds."""
    if isinstance(thing, Tensor):
        return [thing] if thing.is_floating_point() else []
    if isinstance(thing, dict):
        return [tensor for each in thing.values() for tensor in tensors(each)]
    inner = vars(thing).values() if hasattr(thing, "__dict__") else ()
    return [tensor for each in inner for tensor in tensors(each)]

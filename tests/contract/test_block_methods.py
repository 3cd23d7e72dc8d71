"""What every method on whole blocks owes; adding one to METHODS tests it."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import pytest
import torch
import yaml

from decoct.arch import Slot
from decoct.methods import METHODS, BlockMethod, BlockWeights
from decoct.methods.quantize.rtn import RTN
from decoct.recipe import RecipeError, build_method, method_settings, parse_recipe
from decoct.weights import Dense, GroupInt, LowRank, Masked, Shared, Sum, Weight
from tests.reference.inputs import correlated, gaussian

WIDTH, MIDDLE, LENGTH, SEQUENCES = 32, 64, 24, 12
UP, DOWN = "model.layers.3.mlp.up_proj.weight", "model.layers.3.mlp.down_proj.weight"
SLOTS = {
    UP: Slot("mlp.up_proj.weight", "mlp.up", "mlp_in", "mlp_mid"),
    DOWN: Slot("mlp.down_proj.weight", "mlp.down", "mlp_mid", "resid"),
}
BLOCK_METHODS = {name: cls for name, cls in METHODS.items() if issubclass(cls, BlockMethod)}
EVERY = pytest.mark.parametrize("cls", BLOCK_METHODS.values(), ids=BLOCK_METHODS.keys())


@dataclass
class Mlp:
    """A passage through one residual MLP."""

    matrices: dict[str, torch.Tensor]
    dtype: torch.dtype = torch.float32
    num_sequences: int = SEQUENCES

    def __post_init__(self) -> None:
        self.x = correlated(SEQUENCES * LENGTH, WIDTH).reshape(SEQUENCES, LENGTH, WIDTH).to(self.dtype)
        self.y = self.run({name: w.to(self.dtype) for name, w in self.matrices.items()}, self.x)

    def inputs(self, start: int, stop: int) -> torch.Tensor:
        return self.x[start:stop].clone()

    def targets(self, start: int, stop: int) -> torch.Tensor:
        return self.y[start:stop].clone()

    def run(self, matrices: Mapping[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return x + torch.nn.functional.silu(x @ matrices[UP].T) @ matrices[DOWN].T

    def error(self, weights: Mapping[str, Weight]) -> float:
        out = self.run({name: weight.unpack(self.dtype) for name, weight in weights.items()}, self.x)
        return float((out.float() - self.y.float()).square().mean())


def dense() -> dict[str, Weight]:
    up, down = gaussian(MIDDLE, WIDTH, seed=1), gaussian(WIDTH, MIDDLE, seed=2)
    return {UP: Dense.of(up / WIDTH**0.5), DOWN: Dense.of(down / MIDDLE**0.5)}


def rounded(weights: Mapping[str, Weight], bits: int = 3, group_size: int | str = 16) -> dict[str, Weight]:
    return {name: RTN(bits=bits, group_size=group_size).compress(weight, None) for name, weight in weights.items()}


def passage(weights: Mapping[str, Weight], dtype: torch.dtype = torch.float32) -> Mlp:
    return Mlp({name: weight.unpack(torch.float32) for name, weight in weights.items()}, dtype)


def quick(cls: type[BlockMethod], **settings: Any) -> BlockMethod:
    known = {field.name for field in fields(cls)}
    usual = {"num_steps": 16, "batch_size": 4, "group_size": 16, "bits": 3}
    return cls(**{name: value for name, value in {**usual, **settings}.items() if name in known})


def stored(weights: Mapping[str, Weight]) -> dict[str, torch.Tensor]:
    return {f"{n}/{part}": tensor.clone() for n, weight in weights.items() for part, tensor in weight.tensors().items()}


@EVERY
def test_defaults_construct_a_frozen_dataclass(cls: type[BlockMethod]) -> None:
    method = cls()
    assert is_dataclass(cls)
    assert method == cls()
    assert hash(method) == hash(cls())
    with pytest.raises(AttributeError):
        setattr(method, fields(cls)[0].name, 1)


@EVERY
def test_yaml_round_trip(cls: type[BlockMethod]) -> None:
    for method in (cls(), quick(cls)):
        settings = yaml.safe_load(yaml.safe_dump(method_settings(method)))
        (name,) = settings
        assert build_method(name, settings[name], "here") == method
        (step,) = parse_recipe({"stages": [{"blocks": [settings]}]}).stages[0].steps
        assert step == method
        with pytest.raises(RecipeError, match="whole blocks"):
            parse_recipe({"stages": [{"blocks": [{"linear": settings}]}]})


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_better_than_rounding_and_of_the_promised_size(cls: type[BlockMethod], dtype: torch.dtype) -> None:
    original = dense()
    through, before = passage(original, dtype), stored(original)
    made = quick(cls).compress(BlockWeights(SLOTS, original, original), through)
    assert made.keys() == original.keys()
    assert through.error(made) < 0.9 * through.error(rounded(original))
    for name, weight in made.items():
        assert weight.shape == original[name].shape
        assert weight.nbytes == quick(cls).begin(original[name]).nbytes
    assert all(torch.equal(before[name], tensor) for name, tensor in stored(original).items())


@EVERY
def test_same_seed_same_bits(cls: type[BlockMethod]) -> None:
    original = dense()
    first, second = (quick(cls).compress(BlockWeights(SLOTS, original, original), passage(original)) for _ in range(2))
    again = stored(second)
    assert all(torch.equal(tensor, again[name]) for name, tensor in stored(first).items())


@EVERY
@pytest.mark.parametrize("group_size", [8, "channel", "tensor"])
def test_what_earlier_steps_made_is_improved_and_keeps_its_shape(cls: type[BlockMethod], group_size: int | str) -> None:
    original = dense()
    start = rounded(original, bits=4, group_size=group_size)
    through = passage(original)
    made = quick(cls, bits=None).compress(BlockWeights(SLOTS, original, start), through)
    assert through.error({**start, **made}) <= through.error(start)
    for name, weight in made.items():
        before = start[name]
        assert isinstance(weight, GroupInt)
        assert isinstance(before, GroupInt)
        assert (weight.bits, weight.group_size, weight.nbytes) == (before.bits, before.group_size, before.nbytes)


@EVERY
@pytest.mark.parametrize("symmetric", [True, False])
def test_zeros_stay_zero(cls: type[BlockMethod], symmetric: bool) -> None:
    original = dense()
    masks = {name: gaussian(*weight.shape, seed=5) > 0 for name, weight in original.items()}
    pruned = {n: Masked.of(Dense.of(w.unpack() * masks[n]), masks[n]) for n, w in original.items()}
    made = quick(cls, symmetric=symmetric).compress(BlockWeights(SLOTS, original, pruned), passage(original))
    for name, weight in made.items():
        assert isinstance(weight, Masked)
        assert bool((weight.unpack()[~masks[name]] == 0).all())
        assert torch.equal(weight.survivors(), masks[name])


@EVERY
def test_a_block_with_nothing_to_work_on_is_left(cls: type[BlockMethod]) -> None:
    original = dense()
    method = quick(cls, bits=None)
    assert method.compress(BlockWeights(SLOTS, original, original), passage(original)) == {}
    for weight in original.values():
        assert "quantiz" in str(method.obstacle(weight, weight))


@EVERY
def test_what_is_not_quantized_is_left(cls: type[BlockMethod]) -> None:
    original = dense()
    start = {**original, UP: rounded(original)[UP]}
    through = passage(original)
    made = quick(cls, bits=None).compress(BlockWeights(SLOTS, original, start), through)
    assert made.keys() == {UP}
    assert through.error({**start, **made}) < through.error(start)


@EVERY
def test_protected_slots_are_left(cls: type[BlockMethod]) -> None:
    original = dense()
    slots = {**SLOTS, DOWN: replace(SLOTS[DOWN], protected=True)}
    assert quick(cls).compress(BlockWeights(slots, original, rounded(original)), passage(original)).keys() == {UP}


def kinds(weight: Weight) -> list[str]:
    return [node.kind for node in weight.walk()]


def pieces(weight: Weight, wanted: torch.Tensor) -> dict[str, Weight]:
    """What earlier steps may have made of a matrix."""
    u, s, v = torch.linalg.svd(wanted - weight.unpack())
    correction = LowRank.of(Dense.of(u[:, :4] * s[:4]), Dense.of(v[:4]))
    survivors = gaussian(*weight.shape, seed=5) > -1
    u, s, v = torch.linalg.svd(wanted, full_matrices=False)
    return {
        "masked": Masked.of(weight, survivors),
        "corrected": Sum.of(weight, correction),
        "masked and corrected": Sum.of(Masked.of(weight, survivors), correction),
        "corrected and masked": Masked.of(Sum.of(weight, correction), survivors),
        "factors": LowRank.of(*rounded({"left": Dense.of(u * s), "right": Dense.of(v)}, bits=4, group_size=8).values()),
    }


@EVERY
@pytest.mark.parametrize("made_of", ["masked", "corrected", "masked and corrected", "corrected and masked", "factors"])
def test_every_nesting_is_improved_and_kept(cls: type[BlockMethod], made_of: str) -> None:
    original = dense()
    start = {name: pieces(weight, original[name].unpack())[made_of] for name, weight in rounded(original).items()}
    through, before = passage(original), stored(start)
    made = quick(cls, bits=None).compress(BlockWeights(SLOTS, original, start), through)
    assert made.keys() == start.keys()
    assert through.error(made) < through.error(start) or made_of == "factors"
    after = stored(made)
    for name, weight in made.items():
        assert kinds(weight) == kinds(start[name])
        assert weight.nbytes == start[name].nbytes
    real = [key for key, tensor in before.items() if key.endswith("values")]
    assert all(torch.equal(before[key], after[key]) for key in real), "what is not on a grid stays as it is"
    assert all(torch.equal(before[name], tensor) for name, tensor in stored(start).items())


@EVERY
def test_factors_that_it_rounds_are_given_back(cls: type[BlockMethod]) -> None:
    original = dense()
    factors: dict[str, Weight] = {}
    for name, weight in original.items():
        u, s, v = torch.linalg.svd(weight.unpack(), full_matrices=False)
        factors[name] = LowRank.of(Dense.of(u * s), Dense.of(v))
    made = quick(cls, group_size=8).compress(BlockWeights(SLOTS, original, factors), passage(original))
    assert {name: kinds(weight) for name, weight in made.items()} == {
        name: ["LowRank", "GroupInt", "GroupInt"] for name in original
    }


@EVERY
def test_what_was_quantized_before_the_stage_is_left(cls: type[BlockMethod]) -> None:
    """There is nothing left that it could be compared with."""
    original = dense()
    start = rounded(original)
    assert quick(cls).compress(BlockWeights(SLOTS, start, start), passage(start)) == {}
    reason = quick(cls).obstacle(start[UP], start[UP])
    assert reason is not None
    assert "same blocks list" in reason


@EVERY
def test_what_it_cannot_learn_is_named(cls: type[BlockMethod]) -> None:
    (name,) = method_settings(cls())
    weight = dense()[UP]
    for held in (Shared.of(DOWN, weight), rounded(dense())[UP]):
        assert f"{name} " in str(quick(cls).obstacle(held, held))


@EVERY
def test_damaged_inputs_are_named(cls: type[BlockMethod]) -> None:
    original = dense()
    through = passage(original)
    through.x[3, 2, 1] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        quick(cls).compress(BlockWeights(SLOTS, original, original), through)


@EVERY
def test_settings_are_checked(cls: type[BlockMethod]) -> None:
    for wrong in ({"num_steps": 0}, {"batch_size": 0}, {"bits": 9}, {"learning_rate": 0.0}, {"learning_rate": 2.0}):
        known = {field.name for field in fields(cls)}
        if wrong.keys() <= known:
            with pytest.raises(ValueError, match=next(iter(wrong))):
                cls(**wrong)

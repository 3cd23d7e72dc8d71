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
from decoct.weights import Dense, GroupInt, Masked, Weight
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
def test_nothing_to_work_on_is_said(cls: type[BlockMethod]) -> None:
    original = dense()
    method = replace(quick(cls), bits=None)
    with pytest.raises(ValueError, match="quantiz"):
        method.compress(BlockWeights(SLOTS, original, original), passage(original))


@EVERY
def test_damaged_inputs_are_named(cls: type[BlockMethod]) -> None:
    original = dense()
    through = passage(original)
    through.x[3, 2, 1] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        quick(cls).compress(BlockWeights(SLOTS, original, original), through)

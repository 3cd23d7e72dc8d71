"""What every rotation owes; adding one to METHODS tests it."""

from dataclasses import is_dataclass

import pytest
import torch
import yaml

from decoct.methods import METHODS, Rotation
from decoct.recipe import RecipeError, build_method, method_settings, parse_recipe

ROTATIONS: dict[str, type[Rotation]] = {name: cls for name, cls in METHODS.items() if issubclass(cls, Rotation)}
EVERY = pytest.mark.parametrize("cls", ROTATIONS.values(), ids=ROTATIONS.keys())


@EVERY
def test_defaults_construct_a_frozen_dataclass(cls: type[Rotation]) -> None:
    method = cls()
    assert is_dataclass(cls)
    assert method == cls()
    assert hash(method) == hash(cls())
    with pytest.raises(AttributeError):
        method.seed = 1  # type: ignore[misc]


@EVERY
@pytest.mark.parametrize("online", [True, False, ["mlp.down", "attn.o"]])
def test_yaml_round_trip(cls: type[Rotation], online: bool | list[str]) -> None:
    method = cls(online=tuple(online) if isinstance(online, list) else online)
    settings = yaml.safe_load(yaml.safe_dump(method_settings(method)))
    (name,) = settings
    assert build_method(name, settings[name], "here") == method
    (step,) = parse_recipe({"stages": [{"blocks": [settings]}]}).stages[0].steps  # type: ignore[union-attr]
    assert step == method
    with pytest.raises(RecipeError, match="step of its own"):
        parse_recipe({"stages": [{"blocks": [{"linear": settings}]}]})


@EVERY
def test_starts_are_orthogonal_and_follow_the_seed(cls: type[Rotation]) -> None:
    for width in (24, 64):
        q = cls().first_of_residual(width, keeps_mean=False).dense()
        torch.testing.assert_close(q @ q.T, torch.eye(width, dtype=torch.float64))
        assert torch.equal(q, cls(seed=0).first_of_residual(width, keeps_mean=False).dense())
        assert not torch.equal(q, cls(seed=1).first_of_residual(width, keeps_mean=False).dense())
        assert not torch.equal(cls().first_of_values(width).dense(), q)
        assert not torch.equal(cls().signs(width), cls(seed=1).signs(width))


@EVERY
def test_something_must_be_rotated(cls: type[Rotation]) -> None:
    with pytest.raises(ValueError, match="all off"):
        cls(residual=False, values=False, online=False)

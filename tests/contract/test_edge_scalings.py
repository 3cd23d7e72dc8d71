"""What every method that rescales channels owes; adding one to METHODS tests it."""

from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch
import yaml

from decoct.methods import METHODS, EdgeScaling
from decoct.recipe import RecipeError, build_method, method_settings, parse_recipe
from tests.reference.inputs import correlated, gaussian

WIDTH, TOKENS = 64, 200
SCALINGS: dict[str, type[EdgeScaling]] = {n: cls for n, cls in METHODS.items() if issubclass(cls, EdgeScaling)}
EVERY = pytest.mark.parametrize("cls", SCALINGS.values(), ids=SCALINGS.keys())


def readers() -> list[torch.Tensor]:
    return [gaussian(24, WIDTH, seed=1), gaussian(8, WIDTH, seed=2)]


def statistic(cls: type[EdgeScaling], x: torch.Tensor) -> Any:
    stat = cls.stat.empty(x.shape[1])
    stat.add(x)
    return stat


def outlying() -> torch.Tensor:
    """Inputs of which a few channels are much larger than the others, and one is always zero."""
    x = correlated(TOKENS, WIDTH)
    x[:, [3, 17]] *= 30
    x[:, 5] = 0
    return x


def free(scale: torch.Tensor) -> torch.Tensor:
    return scale


@EVERY
def test_defaults_construct_a_frozen_dataclass(cls: type[EdgeScaling]) -> None:
    method = cls()
    assert is_dataclass(cls)
    assert method == cls()
    assert hash(method) == hash(cls())
    with pytest.raises(AttributeError):
        setattr(method, fields(cls)[0].name, 1)


@EVERY
def test_yaml_round_trip(cls: type[EdgeScaling]) -> None:
    settings = yaml.safe_load(yaml.safe_dump(method_settings(cls())))
    (name,) = settings
    assert build_method(name, settings[name], "here") == cls()
    (step,) = parse_recipe({"stages": [{"blocks": [settings]}]}).stages[0].steps
    assert step == cls()
    with pytest.raises(RecipeError, match="step of its own"):
        parse_recipe({"stages": [{"blocks": [{"linear": settings}]}]})


@EVERY
def test_scales_are_positive_and_shrink_outlying_inputs(cls: type[EdgeScaling]) -> None:
    given = readers()
    kept = [w.clone() for w in given]
    scale = cls().scale(given, statistic(cls, outlying()), free)
    assert scale.shape == (WIDTH,)
    assert scale.dtype == torch.float32
    assert bool(torch.isfinite(scale).all())
    assert bool((scale > 0).all())
    usual = scale[torch.tensor([c for c in range(WIDTH) if c not in (3, 5, 17)])].median()
    assert float(scale[3]) > float(usual)
    assert float(scale[17]) > float(usual)
    assert all(torch.equal(a, b) for a, b in zip(given, kept, strict=True))


@EVERY
def test_ties_are_kept(cls: type[EdgeScaling]) -> None:
    def halves(scale: torch.Tensor) -> torch.Tensor:
        return scale.reshape(2, -1).mean(0).repeat(2)

    scale = cls().scale(readers(), statistic(cls, outlying()), halves)
    assert torch.equal(scale[: WIDTH // 2], scale[WIDTH // 2 :])


@EVERY
def test_damaged_numbers_are_named(cls: type[EdgeScaling]) -> None:
    broken = readers()
    broken[1][2, 3] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        cls().scale(broken, statistic(cls, outlying()), free)
    x = outlying()
    x[4, 5] = torch.inf
    with pytest.raises(ValueError, match="NaN"):
        cls().scale(readers(), statistic(cls, x), free)


@EVERY
def test_settings_out_of_range_are_refused(cls: type[EdgeScaling]) -> None:
    bad = {"alpha": 1.5, "bits": 9, "num_ratios": 0, "group_size": 0}
    for field in fields(cls):
        if field.name in bad:
            with pytest.raises(ValueError, match=r"\d"):
                cls(**{field.name: bad[field.name]})

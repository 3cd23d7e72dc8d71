"""What every policy for keys and values owes; adding one to METHODS tests it."""

from dataclasses import fields
from typing import Any

import pytest
import torch

from decoct.methods import METHODS, CacheMethod, Place
from decoct.recipe import build_method, method_settings
from decoct.runtime import BlockCache

POLICIES: dict[str, type[CacheMethod]] = {n: cls for n, cls in METHODS.items() if issubclass(cls, CacheMethod)}
EVERY = pytest.mark.parametrize("cls", POLICIES.values(), ids=POLICIES.keys())
HEADS, CHANNELS, TOKENS = 2, 32, 64


def states(scale: float = 1.0) -> torch.Tensor:
    return torch.randn(2, HEADS, TOKENS, CHANNELS, generator=torch.Generator().manual_seed(4)) * scale


def place(method: CacheMethod, seen: torch.Tensor) -> Place:
    """With what the policy learns from these keys and values."""
    frequencies = 10000.0 ** (-torch.arange(CHANNELS // 2) / (CHANNELS // 2))
    if not method.learns:
        return Place(frequencies=frequencies)
    learner = method.learner(Place(frequencies=frequencies))
    learner.add(seen, seen, (torch.ones_like(seen), torch.ones_like(seen)) if method.by_gradients else None)
    return Place(frequencies=frequencies, learned=learner.learned())


def round_trip(method: CacheMethod, x: torch.Tensor, where: Place) -> tuple[torch.Tensor, torch.Tensor]:
    keys, values = method.pack_keys(x, where, 3), method.pack_values(x, where)
    return method.unpack_keys(keys, where, 3), method.unpack_values(values, where)


@EVERY
def test_it_is_spelled_as_a_recipe_spells_it(cls: type[CacheMethod]) -> None:
    method = cls()
    method.check(CHANNELS, place(method, states()))
    ((name, settings),) = method_settings(method).items()
    assert build_method(name, settings, "here") == method


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_keys_and_values_come_back(cls: type[CacheMethod], dtype: torch.dtype, scale: float) -> None:
    method, x = cls(), states(scale).to(dtype)
    before = x.clone()
    for found in round_trip(method, x, place(method, x)):
        assert found.dtype == torch.float32
        assert found.shape == x.shape
        assert float((found - x.float()).square().mean() / x.float().square().mean()) < 0.02
    assert torch.equal(x, before)


@EVERY
def test_zeros_outliers_and_the_same_again(cls: type[CacheMethod]) -> None:
    method, zeros, loud = cls(), torch.zeros(2, HEADS, TOKENS, CHANNELS), states()
    loud[:, :, ::7, 3] = 1e4
    for x in (zeros, loud):
        where = place(method, x)
        for found, again in zip(round_trip(method, x, where), round_trip(method, x, where), strict=True):
            assert bool(torch.isfinite(found).all())
            assert torch.equal(found, again)
            assert torch.allclose(found, x) or x is loud
    unseen = place(method, states())
    assert all(bool(torch.isfinite(found).all()) for found in round_trip(method, loud * 1e3, unseen))


@EVERY
def test_tokens_may_be_packed_in_pieces_and_stand_along_axis_2(cls: type[CacheMethod]) -> None:
    method, x = cls(), states()
    where, half = place(method, x), TOKENS // 2
    whole, first, second = (
        method.pack_keys(x, where, 0),
        method.pack_keys(x[:, :, :half], where, 0),
        method.pack_keys(x[:, :, half:], where, half),
    )
    for name, tensor in whole.items():
        assert tensor.shape[:2] == x.shape[:2]
        assert tensor.shape[2] * method.step == TOKENS
        assert torch.equal(torch.cat([first[name], second[name]], dim=2), tensor)


@EVERY
def test_it_is_smaller_than_half_precision(cls: type[CacheMethod]) -> None:
    settings: dict[str, Any] = {"window": 0} if "window" in [field.name for field in fields(cls)] else {}
    method, x = cls(**settings), states().bfloat16()
    cache = BlockCache(method, place(method, x))
    cache.update(x, x)
    assert cache.num_packed > 0
    assert cache.packed_nbytes <= 0.5 * 2 * x[:, :, : cache.num_packed].nbytes
    assert cache.nbytes == cache.packed_nbytes + 2 * x[:, :, cache.num_packed :].nbytes

"""KVQuant's learned levels and outliers: what they are learned from, what they are for, and what they take."""

from dataclasses import replace

import pytest
import torch

from decoct.methods import Place
from decoct.methods.cache.kvquant import KVQuant
from decoct.ops.rope import turn
from tests.reference.kvquant import error_of, extreme, half, least_error

FREQUENCIES = torch.tensor([1.0, 0.31, 0.1, 0.032, 0.01, 0.0032, 0.001, 0.00032])
PLACE = Place(frequencies=FREQUENCIES)
METHOD = KVQuant(bits=2, group_size=8, sinks=2, outliers=0.02)


def drawn(seed: int, tokens: int = 13) -> torch.Tensor:
    return torch.randn(1, 2, tokens, 16, generator=torch.Generator().manual_seed(seed))


def learned(method: KVQuant, keys: torch.Tensor, values: torch.Tensor, *slopes: torch.Tensor) -> Place:
    learner = method.learner(PLACE)
    by_keys, by_values = slopes or (torch.ones_like(keys), torch.ones_like(values))
    for each in range(len(keys)):
        one = slice(each, each + 1)
        learner.add(keys[one], values[one], (by_keys[one], by_values[one]))
    return replace(PLACE, learned=learner.learned())


def places_and_weights(groups: torch.Tensor, slopes: torch.Tensor, count: int) -> tuple[list[float], list[float]]:
    """One vector's, from the formula: where its entries lie in their groups, and (slope · range)²."""
    aside, found = extreme(groups.double().tolist(), count), ([], [])
    for g, group in enumerate(groups.double().tolist()):
        rest = [x for i, x in enumerate(group) if (g, i) not in aside]
        low = half(min(rest))
        span = half(max(rest) - low)
        for i, x in enumerate(group):
            if (g, i) not in aside:
                found[0].append(min(max((x - low) / span, 0.0), 1.0))
                found[1].append((float(slopes[g, i]) * span) ** 2)
    return found


def test_levels_are_the_best_for_what_the_loss_depends_on() -> None:
    """Of the tokens after the sinks, in whole groups, keys as they are before RoPE; of a head, and of a token."""
    before, slopes = drawn(0).pow(3), drawn(1).square()
    keys, by_keys = turn(before, FREQUENCIES, 0), turn(slopes, FREQUENCIES, 0)
    values, by_values = drawn(2).pow(3), drawn(3)
    place = learned(METHOD, keys, values, by_keys, by_values)
    found: dict[str, tuple[list[float], list[float]]] = {"key_levels": ([], []), "value_levels": ([], [])}

    def add(name: str, groups: torch.Tensor, by: torch.Tensor, count: int) -> None:
        for into, more in zip(found[name], places_and_weights(groups, by, count), strict=True):
            into.extend(more)

    for head in range(2):
        add("key_levels", before[0, head, 2:10].T, slopes[0, head, 2:10].T, 3)
    for token in range(2, 10):
        groups, by = (each[0, :, token].reshape(-1, 8) for each in (values, by_values))
        add("value_levels", groups, by, 1)
    for name, (x, weights) in found.items():
        error = error_of(x, weights, place.learned[name].double().tolist())
        uniform = error_of(x, weights, [0, 1 / 3, 2 / 3, 1])
        assert error < min(0.9 * uniform, 1.05 * least_error(x, weights, 4))


def test_levels_and_outliers_pay_where_tails_are_heavy() -> None:
    """On other text than that which levels were learned on. Learned ones pay most where there are few of them."""
    before, values = (torch.cat([drawn(s, 66).pow(3) for s in seeds]) for seeds in (range(4), range(4, 8)))
    keys = turn(before, FREQUENCIES, 0)
    errors = {}
    for levels in ("uniform", "nonuniform"):
        for outliers in (0.0, 0.02):
            method = KVQuant(bits=2, group_size=16, sinks=2, levels=levels, outliers=outliers)
            place = learned(method, keys[:2], values[:2])
            new = keys[2:, :, 2:], values[2:, :, 2:]
            back = (
                method.unpack_keys(method.pack_keys(new[0], place, 2), place, 2),
                method.unpack_values(method.pack_values(new[1], place), place),
            )
            errors[levels, outliers] = [float((a - b).square().sum()) for a, b in zip(back, new, strict=True)]
    for of in (0, 1):
        assert errors["nonuniform", 0.0][of] < 0.9 * errors["uniform", 0.0][of]
        assert errors["uniform", 0.02][of] < 0.6 * errors["uniform", 0.0][of]
        assert errors["nonuniform", 0.02][of] < 0.9 * errors["uniform", 0.02][of]


def test_without_both_it_learns_nothing() -> None:
    assert KVQuant().learns
    assert KVQuant().by_gradients
    plain = KVQuant(levels="uniform")
    assert not plain.learns
    assert not plain.by_gradients
    assert "outliers" in plain.pack_keys(drawn(0, 32), PLACE, 0)
    assert "outliers" not in replace(plain, outliers=0).pack_keys(drawn(0, 32), PLACE, 0)


def test_bytes_are_exact() -> None:
    """64 channels, groups of 32: 20 of a head's 2048 keys, 2 of a token's 128 values."""
    method = KVQuant(bits=3, group_size=32, levels="uniform")
    keys = torch.randn(1, 2, 64, 64)
    packed = method.pack_keys(keys, PLACE, 0), method.pack_values(keys, PLACE)
    codes = keys.numel() * 3 // 8 + keys.numel() // 32 * 4
    sizes = [sum(tensor.nbytes for tensor in each.values()) for each in packed]
    assert sizes == [codes + 2 * 2 * 20 * (2 + 2), codes + 64 * round(0.01 * 128) * (2 + 1)]


def test_groups_too_large_for_positions_are_refused() -> None:
    KVQuant(group_size=256).check(256, PLACE)
    with pytest.raises(ValueError, match="set group_size to 248 or less"):
        KVQuant(group_size=264).check(264, PLACE)
    KVQuant(group_size=264, outliers=0).check(264, PLACE)

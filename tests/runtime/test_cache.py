"""What a cache holds: the same however tokens arrive, really packed, and what a whole window is measured with."""

import pytest
import torch

from decoct.methods import CacheMethod, Place
from decoct.methods.cache.fp8_cache import FP8Cache
from decoct.methods.cache.kivi import KIVI
from decoct.methods.cache.kvquant import KVQuant
from decoct.methods.cache.rotated_int4 import RotatedInt4
from decoct.runtime import BlockCache, WholeWindow
from tests.reference.kivi import held_keys, held_values

BATCH, HEADS, CHANNELS, TOKENS = 2, 3, 16, 45
POLICIES: dict[str, CacheMethod] = {
    "kivi": KIVI(bits=4, group_size=8, window=10),
    "kivi2": KIVI(key_bits=2, value_bits=3, group_size=8, window=0),
    "kvquant": KVQuant(bits=2, group_size=8, sinks=3, window=5, outliers=0.05),
    "kvquant, uniform": KVQuant(bits=4, group_size=8, sinks=3, window=5, levels="uniform", outliers=0),
    "rotated_int4": RotatedInt4(),
    "rotated_int4 in groups": RotatedInt4(bits=2, group_size=8, window=6),
    "fp8_cache": FP8Cache(window=1),
}
FREQUENCIES = torch.tensor([1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003])
SCALES = {
    "key_scale": torch.tensor([0.03, 0.03, 0.04]),
    "value_scale": torch.tensor([0.01, 0.02, 0.03]),
    "key_levels": torch.tensor([0.01, 0.3, 0.6, 0.97]),
    "value_levels": torch.tensor([0.05, 0.4, 0.5, 1.0]),
}
PLACE = Place(frequencies=FREQUENCIES, learned=SCALES)
EVERY = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())


def keys_and_values(tokens: int = TOKENS) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    keys, values = (torch.randn(BATCH, HEADS, tokens, CHANNELS, generator=generator) for _ in range(2))
    keys[..., 5] += 8.0  # a channel far from zero, as keys have them
    return keys, values


def filled(policy: CacheMethod, place: Place, pieces: list[int]) -> BlockCache:
    cache = BlockCache(policy, place)
    start = 0
    for piece in pieces:
        cache.update(*(each[:, :, start : start + piece] for each in keys_and_values()))
        start += piece
    return cache


@pytest.mark.parametrize(("bits", "window"), [(2, 0), (4, 10), (8, 3)])
def test_kivi_is_the_papers(bits: int, window: int) -> None:
    keys, values = keys_and_values()
    cache = filled(KIVI(bits=bits, group_size=8, window=window), PLACE, [TOKENS])
    found = cache.held()
    for sequence, head in ((0, 0), (1, 2)):
        expected = (
            held_keys(keys[sequence, head].double().tolist(), bits, 8, window),
            held_values(values[sequence, head].double().tolist(), bits, 8, window),
        )
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine[sequence, head], torch.tensor(theirs), rtol=1e-5, atol=1e-5)


@EVERY
@pytest.mark.parametrize("window", [None, 20])
def test_what_is_held_does_not_depend_on_how_tokens_arrive(policy: CacheMethod, window: int | None) -> None:
    place = Place(sliding_window=window, frequencies=FREQUENCIES, learned=SCALES)
    whole = filled(policy, place, [TOKENS])
    for pieces in ([1] * TOKENS, [7, 30, 8], [40, 1, 1, 3]):
        cache = filled(policy, place, pieces)
        assert cache.length == TOKENS
        assert cache.nbytes == whole.nbytes
        for mine, theirs in zip(cache.held(), whole.held(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@EVERY
def test_new_tokens_are_seen_as_they_are(policy: CacheMethod) -> None:
    keys, values = keys_and_values()
    cache = filled(policy, PLACE, [40])
    before = cache.held()
    seen = cache.update(keys[:, :, 40:], values[:, :, 40:])
    for found, held, new in zip(seen, before, (keys, values), strict=True):
        assert torch.equal(found[:, :, :40], held)
        assert torch.equal(found[:, :, 40:], new[:, :, 40:])


@EVERY
def test_a_token_of_a_whole_window_sees_what_it_would_find_in_a_cache(policy: CacheMethod) -> None:
    """The columns that the mask leaves to token i are, in order of position, what decoding hands to it."""
    keys, values = keys_and_values()
    window = WholeWindow(policy, PLACE)
    both = window.update(keys, values, 0)
    mask = window.mask(None, TOKENS)
    assert mask is not None
    first = 0 if policy.sinks == 0 else policy.sinks
    packed = both[0].shape[2] - TOKENS
    position = torch.cat([torch.arange(packed) + first, torch.arange(TOKENS)])
    cache = BlockCache(policy, PLACE)
    for i in range(TOKENS):
        seen = cache.update(keys[:, :, i : i + 1], values[:, :, i : i + 1])
        columns = mask[0, 0, i].nonzero().flatten()
        columns = columns[position[columns].argsort()]
        assert position[columns].tolist() == list(range(i + 1))
        for mine, theirs in zip(both, seen, strict=True):
            torch.testing.assert_close(mine[:, :, columns], theirs)


@EVERY
def test_a_mask_of_numbers_hides_the_same(policy: CacheMethod) -> None:
    window = WholeWindow(policy, PLACE)
    low = torch.finfo(torch.float32).min
    given = torch.zeros(1, 1, TOKENS, TOKENS).masked_fill(~torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril(), low)
    plain, added = window.mask(None, TOKENS), window.mask(given, TOKENS)
    assert plain is not None
    assert added is not None
    assert torch.equal(plain, added == 0)
    assert float(added[~plain].max()) == low


@EVERY
def test_a_short_text_is_left_as_it_is(policy: CacheMethod) -> None:
    window, (keys, values) = WholeWindow(policy, PLACE), keys_and_values(2)
    if policy.packed_after(1, PLACE) == 0:
        assert window.update(keys, values, 0)[0] is keys or policy.packed_after(2, PLACE) > 0
        assert window.mask(None, 2) is None


def test_kivis_bytes_are_exact() -> None:
    """Codes, a step and a minimum for each group, and the window."""
    cache = filled(KIVI(bits=4, group_size=8, window=10), PLACE, [TOKENS])
    packed, values = 32, 2 * BATCH * HEADS * CHANNELS
    assert cache.num_packed == packed
    assert cache.packed_nbytes == packed * values // 2 + packed * values // 8 * 4
    assert cache.nbytes == cache.packed_nbytes + (TOKENS - packed) * values * 4
    held = cache._last[0].untyped_storage().nbytes()  # type: ignore[index]
    assert held == (TOKENS - packed) * values // 2 * 4
    cache = filled(KIVI(key_bits=2, value_bits=8, group_size=8, window=0), PLACE, [40])
    assert cache.packed_nbytes == 40 * values // 2 * 5 // 4 + 2 * (40 * values // 2 // 8 * 4)


def test_kvquants_bytes_are_exact() -> None:
    """Codes, a step and a minimum for each group, and what is kept aside with its positions; no less is kept alive."""
    cache = filled(POLICIES["kvquant"], PLACE, [20, 25])
    packed, values = 32, BATCH * HEADS * CHANNELS
    assert cache.num_packed == packed
    groups = 2 * packed * values * 2 // 8 + 2 * packed * values // 8 * 4
    of_keys = BATCH * HEADS * packed // 8 * 6 * (2 + 1)  # 6 of 128 in a head and 8 tokens
    of_values = BATCH * packed * 2 * (2 + 1)  # 2 of a token's 48
    assert cache.packed_nbytes == groups + of_keys + of_values
    held = sum(t.untyped_storage().nbytes() for each in cache._packed or () for t in each.values())
    assert held == cache.packed_nbytes


@EVERY
def test_a_sliding_window_sees_its_tokens_and_lets_others_go(policy: CacheMethod) -> None:
    keys, values = keys_and_values()
    place = Place(sliding_window=6, frequencies=FREQUENCIES, learned=SCALES)
    cache, whole = BlockCache(policy, place), BlockCache(policy, Place(frequencies=FREQUENCIES, learned=SCALES))
    for i in range(TOKENS):
        new = keys[:, :, i : i + 1], values[:, :, i : i + 1]
        seen = cache.update(*new)
        assert seen[0].shape[2] == min(i + 1, 6)
        if policy.sinks == 0:
            for mine, theirs in zip(seen, whole.update(*new), strict=True):
                torch.testing.assert_close(mine, theirs[:, :, -6:])
    kept = cache.held()[0].shape[2]
    assert 5 <= kept < max(5, policy.window) + 2 * policy.step


@EVERY
def test_sequences_are_chosen_and_repeated(policy: CacheMethod) -> None:
    cache = filled(policy, PLACE, [40])
    before = cache.held()
    cache.each_sequence(lambda tensor: tensor[[1, 0, 1]])
    for mine, theirs in zip(cache.held(), before, strict=True):
        assert torch.equal(mine, theirs[[1, 0, 1]])
    cache.reset()
    assert cache.length == cache.nbytes == 0
    assert torch.equal(cache.update(*keys_and_values())[0], keys_and_values()[0])


@EVERY
def test_half_precision_stays_half_precision(policy: CacheMethod) -> None:
    cache = BlockCache(policy, PLACE)
    for start in (0, 20):
        seen = cache.update(*(each[:, :, start : start + 20].bfloat16() for each in keys_and_values()))
    assert seen[0].dtype == seen[1].dtype == torch.bfloat16

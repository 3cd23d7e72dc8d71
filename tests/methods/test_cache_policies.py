"""Policies for keys and values against their formulas; what each is for."""

from dataclasses import replace

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from decoct.methods import CacheMethod, Place
from decoct.methods.cache.fp8_cache import FP8Cache
from decoct.methods.cache.kivi import KIVI
from decoct.methods.cache.kvquant import KVQuant
from decoct.methods.cache.rotated_int4 import RotatedInt4
from decoct.ops.hadamard import hadamard_matrix
from decoct.ops.rope import turn
from tests.reference.min_max import back
from tests.reference.minifloat import nearest, number
from tests.reference.rope import turned

FREQUENCIES = torch.tensor([1.0, 0.31, 0.1, 0.032, 0.01, 0.0032, 0.001, 0.00032])
PLACE = Place(frequencies=FREQUENCIES)
PLAIN = KVQuant(levels="uniform", outliers=0)


def heads(tokens: int = 32, channels: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 2, tokens, channels, generator=torch.Generator().manual_seed(seed))


def key_error(method: CacheMethod, keys: torch.Tensor, start: int = 0) -> float:
    found = method.unpack_keys(method.pack_keys(keys, PLACE, start), PLACE, start)
    return float((found - keys).square().sum() / keys.square().sum())


@pytest.mark.parametrize("pairs", [8, 5])
def test_rope_is_the_formula_and_transformers(pairs: int) -> None:
    """Also where only some channels are turned."""
    x, frequencies = heads(), FREQUENCIES[:pairs]
    found = turn(x, frequencies, 40)
    expected = [
        turned(token, frequencies.double().tolist(), 40 + i) for i, token in enumerate(x[1, 0].double().tolist())
    ]
    torch.testing.assert_close(found[1, 0], torch.tensor(expected), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(turn(found, frequencies, 40, inverse=True), x, rtol=1e-5, atol=1e-5)
    if pairs == 8:
        angles = torch.outer(torch.arange(40, 72).float(), frequencies).repeat(1, 2)
        _, theirs = apply_rotary_pos_emb(x, x, angles.cos()[None], angles.sin()[None])
        torch.testing.assert_close(found, theirs, rtol=1e-4, atol=1e-4)


def test_kvquant_packs_keys_as_they_were_before_rope() -> None:
    method, keys = replace(PLAIN, bits=3, group_size=8), heads()
    found = method.unpack_keys(method.pack_keys(keys, PLACE, 5), PLACE, 5)
    before = turn(keys.double(), FREQUENCIES, 5, inverse=True)
    for first in range(0, 32, 8):
        for channel in range(16):
            column = back(before[0, 1, first : first + 8, channel].tolist(), 3)
            before[0, 1, first : first + 8, channel] = torch.tensor(column)
    torch.testing.assert_close(found[0, 1], turn(before, FREQUENCIES, 5)[0, 1].float(), rtol=1e-4, atol=1e-4)


def test_kvquant_pays_where_channels_are_alike_before_rope() -> None:
    """Channels far from zero, as keys have them: positions smear them over two channels."""
    before = heads(seed=1) * 0.2
    before[..., 1] += 6.0
    keys = turn(before, FREQUENCIES, 100)
    assert key_error(replace(PLAIN, group_size=16), keys, 100) < 0.2 * key_error(KIVI(group_size=16), keys, 100)


def test_the_transform_is_hadamards_and_groups_are_a_tokens() -> None:
    method, values = RotatedInt4(bits=4, group_size=8), heads()
    matrix = hadamard_matrix(16) / 4
    turned_ = (values[0, 1].double() @ matrix.T).reshape(32, 2, 8)
    expected = torch.tensor([[back(group, 4) for group in token] for token in turned_.tolist()]).double()
    found = method.unpack_values(method.pack_values(values, PLACE), PLACE)[0, 1]
    torch.testing.assert_close(found, (expected.reshape(32, 16) @ matrix).float(), rtol=1e-4, atol=1e-5)


def test_rotation_pays_where_a_channel_stands_out() -> None:
    keys = heads(channels=64, seed=2)
    keys[..., 7] += 20.0 * torch.randn(2, 2, 32, generator=torch.Generator().manual_seed(0))
    plain = torch.tensor([[back(token, 4) for token in head] for head in keys.flatten(0, 1).tolist()])
    without = float((plain.reshape(keys.shape) - keys)[..., :7].square().mean())
    method = RotatedInt4()
    found = method.unpack_keys(method.pack_keys(keys, PLACE, 0), PLACE, 0)
    assert float((found - keys)[..., :7].square().mean()) < 0.7 * without


def test_rotation_fits_any_head() -> None:
    """Heads of 80 and 96 channels, as some models have them; one whose length has no Hadamard matrix."""
    for channels in (80, 96, 72, 56):
        keys = heads(channels=channels)
        RotatedInt4().check(channels, PLACE)
        assert key_error(RotatedInt4(bits=8), keys) < 1e-4
    with pytest.raises(ValueError, match=r"group_size 8 does not divide heads of 20 channels"):
        RotatedInt4().check(20, PLACE)


def test_fp8_learns_a_scale_for_each_head_and_saturates() -> None:
    method = FP8Cache(margin=2.0)
    learner = method.learner(Place())
    for keys, values in zip(heads(seed=0).split(1), heads(seed=1).split(1), strict=True):
        learner.add(keys, values, None)
    learned = learner.learned()
    torch.testing.assert_close(learned["key_scale"], heads(seed=0).abs().amax((0, 2, 3)) * 2 / 448)
    place = Place(learned=learned)
    keys = heads(seed=5) * 100
    found = method.unpack_keys(method.pack_keys(keys, place, 0), place, 0)
    for head in range(2):
        scale = float(learned["key_scale"][head])
        codes = [nearest(x / scale, "e4m3") for x in keys[0, head, 3].double().tolist()]
        torch.testing.assert_close(found[0, head, 3], torch.tensor([number(code, "e4m3") * scale for code in codes]))
    assert float(found.abs().max()) <= 448 * float(learned["key_scale"].max()) * (1 + 1e-6)


def test_fp8_of_a_head_that_is_always_zero_and_of_damage() -> None:
    method, keys = FP8Cache(), torch.zeros(1, 2, 3, 2)
    learner = method.learner(Place())
    learner.add(keys, keys, None)
    place = Place(learned=learner.learned())
    assert torch.equal(method.unpack_keys(method.pack_keys(keys, place, 0), place, 0), keys)
    learner.add(keys, keys + torch.inf, None)
    with pytest.raises(ValueError, match="not finite"):
        learner.learned()


@pytest.mark.parametrize("method", [KIVI(), PLAIN, RotatedInt4()])
def test_more_bits_lose_less(method: KIVI | KVQuant | RotatedInt4) -> None:
    errors = [key_error(replace(method, bits=bits), heads()) for bits in (2, 4, 8)]
    assert errors[0] > 8 * errors[1] > 64 * errors[2] > 0


def test_kvquant_needs_rotary_positions() -> None:
    with pytest.raises(ValueError, match="undoes rotary positions, and this model has none; use kivi"):
        KVQuant().check(64, Place())


def test_settings_out_of_range() -> None:
    for build, message in (
        (lambda: KVQuant(sinks=-1), "sinks must not be negative"),
        (lambda: KVQuant(levels="even"), "levels must be uniform or nonuniform, not 'even'"),
        (lambda: KVQuant(outliers=0.3), r"outliers is a share from 0 to 0.25, not 0.3"),
        (lambda: KVQuant(outliers=-0.1), "outliers is a share"),
        (lambda: RotatedInt4(group_size="channel"), "must be a number or head"),
        (lambda: RotatedInt4(bits=9), "bits must be 2 to 8"),
        (lambda: FP8Cache(margin=0.5), "margin must be at least 1"),
        (lambda: FP8Cache(window=-1), "window must not be negative"),
    ):
        with pytest.raises(ValueError, match=message):
            build()

"""transformers with a saved policy: decoding gives the logits that we measure with, for every family."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from decoct.engine.runner import Runner
from decoct.hf import PolicyCache, make_cache
from decoct.methods.policy import read_policy
from decoct.model import Model, open_model
from decoct.runtime import WholeWindow, places
from tests.engine.running import RTN, Settings, make_base, run
from tests.tiny import CONFIGS

KIVI: Settings = {"kivi": {"bits": 4, "group_size": 8, "window": 4}}
TOKENS = torch.randint(3, 60, (2, 37), generator=torch.Generator().manual_seed(1))


def measured_logits(model: Model, tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What `decoct evaluate` computes: all tokens at once."""
    policy, runner = read_policy(model), Runner(model, dtype)
    assert policy is not None
    hidden = runner.embed(tokens, model.weight(model.family.embed).unpack(dtype))
    for block, place in enumerate(places(policy, runner.attentions())):
        names = [model.prefix(block) + slot.name for slot in model.block_slots]
        laid = runner.lay_out(block, {name: model.weight(name) for name in names})
        hidden = runner.run(block, laid, hidden, WholeWindow(policy.method, place))
    head = model.weight(model.family.embed if model.tied else model.family.head)
    return runner.logits(hidden, head.unpack(dtype))


def decoded_logits(folder: Path, tokens: torch.Tensor, dtype: torch.dtype, at_once: int) -> torch.Tensor:
    """What transformers computes with the saved cache, so many tokens at a time."""
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation="eager")
    cache = make_cache(folder)
    found = [loaded(piece, past_key_values=cache, use_cache=True).logits for piece in tokens.split(at_once, dim=1)]
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_decoding_token_by_token_is_what_is_measured(name: str, tmp_path: Path) -> None:
    """In float64, so that no code is rounded the other way. Sliding windows of 8 tokens among them."""
    base = make_base(tmp_path, name)
    out = run(base, tmp_path / "out", stages=[{"cache": KIVI}]).folder
    measured = measured_logits(open_model(out), TOKENS, torch.float64)
    decoded = decoded_logits(out, TOKENS, torch.float64, 1)
    torch.testing.assert_close(decoded, measured, rtol=1e-4, atol=1e-5)
    reference = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64, experts_implementation="eager")
    plain = reference(TOKENS).logits
    off = (measured - plain).abs().amax((0, 2))
    assert float(off[:9].max()) < 1e-5, "nothing is packed yet"
    assert float(off[20:].max()) > 1e-4, "packed keys and values are seen"


OTHERS: dict[str, Settings] = {
    "kvquant": {"group_size": 8, "sinks": 2, "window": 3},
    "rotated_int4": {"bits": 4},
    "fp8_cache": {},
}


@pytest.mark.parametrize("policy", OTHERS)
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gemma3_text", "gpt_neox", "gpt2"])
@torch.no_grad()
def test_other_policies_too(name: str, policy: str, tmp_path: Path) -> None:
    """Norms of keys, soft caps, sliding windows beside full ones, positions that turn some channels, none at all."""
    base, stages = make_base(tmp_path, name), [{"cache": {policy: OTHERS[policy]}}]
    if (name, policy) == ("gpt2", "kvquant"):
        with pytest.raises(ValueError, match="this model has none; use kivi"):
            run(base, tmp_path / "out", stages=stages)
        return
    out = run(base, tmp_path / "out", stages=stages).folder
    measured = measured_logits(open_model(out), TOKENS, torch.float64)
    torch.testing.assert_close(decoded_logits(out, TOKENS, torch.float64, 1), measured, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_pieces_of_a_group_are_as_good_as_single_tokens(tmp_path: Path) -> None:
    """A prompt fed `group_size` tokens at a time, from where the window is full, is decoded as it is measured."""
    out = run(
        make_base(tmp_path), tmp_path / "out", stages=[{"cache": {"kivi": {"group_size": 8, "window": 8}}}]
    ).folder
    measured = measured_logits(open_model(out), TOKENS, torch.float64)
    torch.testing.assert_close(decoded_logits(out, TOKENS, torch.float64, 8), measured, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_generate_with_packed_weights_and_beams(tmp_path: Path) -> None:
    base = make_base(tmp_path)
    out = run(base, tmp_path / "out", stages=[{"blocks": [RTN]}, {"cache": KIVI}]).folder
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    for settings in ({}, {"num_beams": 3}, {"prefill_chunk_size": 8}):
        cache = make_cache(out)
        made = loaded.generate(
            TOKENS, past_key_values=cache, max_new_tokens=6, min_new_tokens=6, do_sample=False, **settings
        )
        assert made.shape == (2, 43)
        assert cache.get_seq_length() == 42
        assert cache.layers[0].cache.num_packed == 32


def test_its_bytes_are_those_that_it_holds(tmp_path: Path) -> None:
    out = run(make_base(tmp_path), tmp_path / "out", stages=[{"cache": KIVI}]).folder
    cache = make_cache(out)
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    loaded(TOKENS, past_key_values=cache, use_cache=True)
    assert isinstance(cache, PolicyCache)
    values = 3 * 2 * 2 * 2 * 8  # blocks, keys and values, sequences, heads, channels
    assert cache.nbytes == 32 * (values // 2 + values // 8 * 4) + 5 * values * 2


def test_a_model_without_a_policy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"base has no key-value cache policy; save one with a recipe's stage"):
        make_cache(make_base(tmp_path))


def test_what_a_packed_cache_cannot_do(tmp_path: Path) -> None:
    cache = make_cache(run(make_base(tmp_path), tmp_path / "out", stages=[{"cache": KIVI}]).folder)
    with pytest.raises(ValueError, match="cannot take tokens back"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="not offloaded"):
        cache.offload(0)

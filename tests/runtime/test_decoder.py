"""The decode loop gives transformers' tokens: every family that it knows, prompts in pieces, many sequences at once."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from decoct.model import open_model
from decoct.native.library import library
from decoct.runtime import decoder
from decoct.runtime.decoder import Decoder
from decoct.runtime.network import Feed
from tests.engine.running import RTN, make_base, run
from tests.tiny import CONFIGS, save_model

FAST = ["llama", "llama-tied", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3"]
PROMPT = torch.randint(3, 60, (13,), generator=torch.Generator().manual_seed(1)).tolist()


def theirs(folder: Path, prompt: list[int], count: int, dtype: torch.dtype = torch.float32) -> list[int]:
    """What transformers writes, the likeliest token each time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    found = model.generate(
        torch.tensor([prompt]), do_sample=False, max_new_tokens=count, eos_token_id=None, pad_token_id=0
    )
    return list(found[0, len(prompt) :].tolist())


def ours(network: Decoder, prompt: list[int], count: int, seat: int = 0) -> list[int]:
    """What the loop writes."""
    found = [int(network.advance([Feed(seat, prompt)]).argmax())]
    while len(found) < count:
        found.append(int(network.advance([Feed(seat, found[-1:])]).argmax()))
    return found


@pytest.mark.parametrize("name", FAST)
def test_tokens_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    save_model(name, tmp_path)
    network = Decoder(open_model(tmp_path), context=48)
    assert ours(network, PROMPT, 30) == theirs(tmp_path, PROMPT, 30)


@pytest.mark.parametrize("name", FAST)
@torch.no_grad()
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    reference = save_model(name, tmp_path, torch.float64)
    network = Decoder(open_model(tmp_path), context=48)
    logits = network.advance([Feed(0, PROMPT)])
    torch.testing.assert_close(logits[0], reference(torch.tensor([PROMPT])).logits[0, -1].float())


def test_a_real_model_in_its_own_dtypes(stories: Path) -> None:
    prompt = [1, 403, 407, 261, 378]
    for dtype in (torch.float32, torch.bfloat16):
        network = Decoder(open_model(stories), context=80, dtype=dtype)
        assert ours(network, prompt, 60) == theirs(stories, prompt, 60, dtype)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_sequences_do_not_see_each_other(name: str, tmp_path: Path) -> None:
    """Prompts of several lengths, decoded in one batch; one of them begins while the others go on."""
    save_model(name, tmp_path)
    network = Decoder(open_model(tmp_path), context=40, num_seats=3)
    prompts = [PROMPT, PROMPT[:4], PROMPT[3:10]]
    alone = []
    for prompt in prompts:
        alone.append(ours(network, prompt, 12, seat=1))
        network.release(1)
    found: list[list[int]] = [[], [], []]
    for step in range(20):
        running = [seat for seat in range(3) if step >= 2 * seat and len(found[seat]) < 12]
        if not running:
            break
        logits = network.advance([Feed(seat, found[seat][-1:] or prompts[seat]) for seat in running])
        for row, seat in zip(logits, running, strict=True):
            found[seat].append(int(row.argmax()))
    assert found == alone
    assert [network.length(seat) for seat in range(3)] == [len(prompt) + 11 for prompt in prompts]


def test_a_long_prompt_goes_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model("mistral", tmp_path)
    whole = Decoder(open_model(tmp_path), context=48).advance([Feed(0, PROMPT)])
    monkeypatch.setattr(decoder, "_TOKENS_AT_ONCE", 5)
    pieces = Decoder(open_model(tmp_path), context=48).advance([Feed(0, PROMPT)])
    torch.testing.assert_close(pieces, whole)


@pytest.mark.parametrize(
    "step", [RTN, {"linear": {"wanda": {"sparsity": 0.5}}}, {"linear": {"svd_llm": {"keep": 0.5}}}]
)
def test_compressed_models(step: dict[str, object], tmp_path: Path) -> None:
    import decoct.hf  # noqa: F401 - transformers learns to load what decoct wrote

    base = make_base(tmp_path, "llama-tied")
    out = run(base, tmp_path / "out", step).folder
    network = Decoder(open_model(out), context=48)
    assert ours(network, PROMPT, 30) == theirs(out, PROMPT, 30)


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_a_saved_cache_policy_is_kept(name: str, tmp_path: Path) -> None:
    """As transformers with decoct's cache, and other tokens than without one."""
    from decoct.hf import make_cache

    base = make_base(tmp_path, name)
    out = run(base, tmp_path / "out", stages=[{"cache": {"kivi": {"bits": 2, "group_size": 8, "window": 4}}}]).folder
    network = Decoder(open_model(out), context=60)
    model = AutoModelForCausalLM.from_pretrained(out)
    found = model.generate(
        torch.tensor([PROMPT]), do_sample=False, max_new_tokens=40, eos_token_id=None, pad_token_id=0,
        past_key_values=make_cache(out),
    )  # fmt: skip
    assert ours(network, PROMPT, 40) == found[0, len(PROMPT) :].tolist()
    assert network.cache_nbytes < Decoder(open_model(base), context=60).cache_nbytes
    network.release(0)
    assert network.cache_nbytes == 0


@pytest.mark.parametrize("name", sorted(set(CONFIGS) - set(FAST)))
def test_other_families_are_refused(name: str, tmp_path: Path) -> None:
    save_model(name, tmp_path)
    with pytest.raises(ValueError, match="use --engine transformers"):
        Decoder(open_model(tmp_path), context=8)


def test_a_prompt_beside_a_single_token(tmp_path: Path) -> None:
    """The one goes through the kernels' step, the other through torch; each gives what it gives alone, in order."""
    save_model("llama", tmp_path)
    alone = Decoder(open_model(tmp_path), context=40, num_seats=2)
    first = alone.advance([Feed(0, PROMPT)])
    wanted = torch.cat([alone.advance([Feed(1, PROMPT[:5])]), alone.advance([Feed(0, [7])])])
    network = Decoder(open_model(tmp_path), context=40, num_seats=2)
    assert torch.equal(network.advance([Feed(0, PROMPT)]), first)
    torch.testing.assert_close(network.advance([Feed(1, PROMPT[:5]), Feed(0, [7])]), wanted)
    assert (network.length(0), network.length(1)) == (len(PROMPT) + 1, 5)


def test_many_sequences_at_once(tmp_path: Path) -> None:
    """More than the kernels multiply directly."""
    save_model("llama", tmp_path)
    network = Decoder(open_model(tmp_path), context=20, num_seats=20)
    few = Decoder(open_model(tmp_path), context=20, num_seats=1)
    for seat in range(20):
        network.advance([Feed(seat, PROMPT[: 1 + seat % 5])])
    found = network.advance([Feed(seat, [seat + 3]) for seat in range(20)])
    for seat in range(20):
        few.advance([Feed(0, PROMPT[: 1 + seat % 5])])
        torch.testing.assert_close(found[seat], few.advance([Feed(0, [seat + 3])])[0], rtol=1e-4, atol=1e-4)
        few.release(0)


def test_rounded_prompts(tmp_path: Path) -> None:
    """Near the exact ones, and said; where no kernel rounds, that is said instead."""
    base, found = make_base(tmp_path, "llama"), library()
    there = found is not None and "avx512bf16" in found.levels
    for folder, able in ((run(base, tmp_path / "out", RTN).folder, there), (base, False)):
        exact, rounded = (Decoder(open_model(folder), context=48, rounded_prompts=each) for each in (False, True))
        wanted, got = (network.advance([Feed(0, PROMPT * 2)]) for network in (exact, rounded))
        said = "prompts rounded to 8 bits" if able else "prompts exact: no kernel here rounds them"
        assert rounded.about.endswith(said)
        assert torch.equal(wanted, got) != able
        assert (wanted - got).abs().max() <= 0.05 * wanted.abs().max()

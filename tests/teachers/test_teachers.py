"""Teachers made of others: several, cached on disk, with another tokenizer."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers.decoders import ByteLevel
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from decoct.losses import (
    ULD,
    Aligned,
    Batch,
    CachedKL,
    ForwardKL,
    Head,
    Logits,
    Mixed,
    MostConfident,
    Projected,
    Targets,
    keep_top,
)
from decoct.teachers import CachedTeacher, OtherTokenizer, Several, cache_bytes, same_tokenizer, write_cache

VOCAB, WIDTH = 30, 4


class Table:
    """A teacher that looks only at the last token; it counts how often it is asked."""

    def __init__(self, seed: int = 0, vocab: int = VOCAB) -> None:
        self.table = 2 * torch.randn(vocab, vocab, generator=torch.Generator().manual_seed(seed))
        self.asked = 0

    def __call__(self, tokens: Tensor) -> Targets:
        self.asked += 1
        return Logits(self.table[tokens.reshape(-1)])


def draw_tokens(count: int = 5, length: int = 8) -> Tensor:
    return torch.randint(VOCAB, (count, length), generator=torch.Generator().manual_seed(1))


def student(tokens: Tensor) -> Projected:
    generator = torch.Generator().manual_seed(2)
    return Projected(
        torch.randn(tokens.numel(), WIDTH, generator=generator), Head(torch.randn(VOCAB, WIDTH, generator=generator))
    )


def test_several() -> None:
    tokens, first, second = draw_tokens(), Table(0), Table(1)
    found = Several((first, second), (1.0, 2.0))(tokens)
    assert isinstance(found, Mixed)
    assert found.weights == (1.0, 2.0)
    assert isinstance(Several((first, second))(tokens), MostConfident)
    with pytest.raises(ValueError, match="no teacher"):
        Several(())
    with pytest.raises(ValueError, match="2 teachers need as many positive weights"):
        Several((first, second), (1.0,))


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("decoct.teachers.cached._SHARD_TOKENS", 16)  # two sequences of 8


def test_a_cached_teacher_says_what_the_teacher_said(tmp_path: Path, small_shards: None) -> None:
    tokens, teach = draw_tokens(), Table()
    seen: list[tuple[int, int]] = []
    write_cache(tmp_path, teach, "me", tokens, 6, lambda *done: seen.append(done))
    assert seen == [(2, 5), (4, 5), (5, 5)]
    cached = CachedTeacher(tmp_path, "me", tokens)
    some = tokens[[3, 0, 4]]
    own, what = student(some), Batch.of(some)
    direct = CachedKL()(own, keep_top(teach(some), 6), what)
    assert float(CachedKL()(own, cached(some), what)) == pytest.approx(float(direct), rel=1e-6)
    shards = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert cache_bytes(tokens.numel(), 6) <= shards < cache_bytes(tokens.numel(), 6) + 3 * 600


def test_writing_a_cache_goes_on_where_it_stopped(tmp_path: Path, small_shards: None) -> None:
    tokens = draw_tokens()

    class Stopped(Exception):  # noqa: N818 - no error
        pass

    def stop(done: int, _: int) -> None:
        if done == 4:
            raise Stopped

    with pytest.raises(Stopped):
        write_cache(tmp_path, Table(), "me", tokens, 6, stop)
    with pytest.raises(ValueError, match="lacks 1 of 3 shards"):
        CachedTeacher(tmp_path, "me", tokens)
    teach = Table()
    write_cache(tmp_path, teach, "me", tokens, 6)
    assert teach.asked == 2, "once for the vocabulary, once for the last sequence"
    CachedTeacher(tmp_path, "me", tokens)


def test_a_cache_of_something_else_is_refused(tmp_path: Path) -> None:
    tokens = draw_tokens()
    write_cache(tmp_path, Table(), "me", tokens, 6)
    for teacher, text, k, words in (
        ("you", tokens, 6, "another teacher"),
        ("me", tokens + 1, 6, "another text"),
        ("me", tokens, 5, "another k"),
    ):
        with pytest.raises(ValueError, match=words):
            write_cache(tmp_path, Table(vocab=VOCAB + 1), teacher, text, k)
    with pytest.raises(ValueError, match="another teacher"):
        CachedTeacher(tmp_path, "you", tokens)
    with pytest.raises(ValueError, match="another text"):
        CachedTeacher(tmp_path, "me", tokens.flip(0))
    with pytest.raises(ValueError, match="not in the teacher's cache"):
        CachedTeacher(tmp_path, "me", tokens)(tokens + 1)
    (tmp_path / "cache.json").write_text(json.dumps({"teacher": "me"}))
    with pytest.raises(ValueError, match="does not describe"):
        CachedTeacher(tmp_path, "me", tokens)
    with pytest.raises(ValueError, match="does not exist"):
        CachedTeacher(tmp_path / "none", "me", tokens)


def test_a_k_that_does_not_fit_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="k must be between 1 and 29"):
        write_cache(tmp_path, Table(), "me", draw_tokens(), VOCAB)
    assert not list(tmp_path.iterdir())


TEXT = "the cat sat on the mat. the dog sat on the cat. naïve cats, thé and mats."


def tokenizer(vocab: int, **special: str) -> Any:
    """Byte-level pairs learned from a few words; with the smallest vocabulary every token is a byte."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator([TEXT] * 4, trainers.BpeTrainer(vocab_size=vocab, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


def test_another_tokenizer_is_used_where_boundaries_meet() -> None:
    own, others = tokenizer(256), tokenizer(290)
    asked: list[list[int]] = []

    def teach(tokens: Tensor) -> Targets:
        asked.append(tokens[0].tolist())
        return Logits(torch.nn.functional.one_hot(tokens[0], len(others)).float())  # says which token it stands at

    ids = own(TEXT)["input_ids"]
    theirs = others(TEXT)["input_ids"]
    found = OtherTokenizer(teach, own, others)(torch.tensor([ids]))
    assert isinstance(found, Aligned)
    assert asked == [theirs]
    assert found.num_tokens == len(ids)
    part = slice(0, found.vocab)
    stands_at = found.rows(torch.arange(len(ids)), [part]).columns(part).argmax(-1)
    ends, text = {}, b""
    for token in theirs:
        text += bytes(others.decode([token]), "utf-8") if "�" not in others.decode([token]) else b"??"
        ends[len(text)] = token
    assert 10 < int(found.known.sum()) < len(ids)
    for position in range(20):  # plain ASCII: a byte is a character
        assert bool(found.known[position]) == (position + 1 in ends)
        if position + 1 in ends:
            assert int(stands_at[position]) == ends[position + 1]
    inside = TEXT.encode().index("ï".encode())
    assert not bool(found.known[inside]), "half a character is no boundary"


def test_uld_learns_from_another_tokenizer() -> None:
    own, others = tokenizer(256), tokenizer(290, bos_token="<s>")  # noqa: S106 - no password
    generator = torch.Generator().manual_seed(3)
    table = torch.randn(len(others), len(others), generator=generator)
    teacher = OtherTokenizer(lambda tokens: Logits(table[tokens.reshape(-1)]), own, others)
    tokens = torch.tensor([own(TEXT)["input_ids"][:30], own(TEXT)["input_ids"][8:38]])
    hidden = torch.randn(60, WIDTH, generator=generator).requires_grad_()
    head = Head(torch.randn(len(own), WIDTH, generator=generator))
    targets, what = teacher(tokens), Batch.of(tokens)
    losses = []
    for _ in range(20):
        loss = ULD()(Projected(hidden, head), targets, what)
        losses.append(float(loss.detach()))
        (gradient,) = torch.autograd.grad(loss, hidden)
        with torch.no_grad():
            hidden.sub_(5 * gradient)
    assert losses[-1] < 0.8 * losses[0]
    with pytest.raises(ValueError, match="take the loss uld"):
        ForwardKL()(Projected(hidden, head), targets, what)


def test_same_tokenizer() -> None:
    assert same_tokenizer(tokenizer(256), tokenizer(256))
    assert not same_tokenizer(tokenizer(256), tokenizer(280))

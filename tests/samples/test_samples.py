"""What a student reads: files with prompts, texts that models write, and how both are mixed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from decoct.engine.data import load_tokenizer
from decoct.model import open_model
from decoct.samples import Lesson, Mixer, Mixing, Source, Writing, collate, read_records, seeds_of_vocabulary, write
from decoct.samples.write import writer_of
from tests.tiny import make_model, save_model

VOCAB = 96


def fixed(table: Tensor) -> Any:
    """A writer that looks only at the last token."""
    return lambda: lambda tokens: table[tokens[:, -1]]


def test_lessons_become_a_batch() -> None:
    tokens, batch = collate([Lesson((5, 6, 7, 8), 2), Lesson((9, 10), 1, by_student=True)], pad=3)
    assert tokens.tolist() == [[5, 6, 7, 8], [9, 10, 3, 3]]
    taught = (batch.weights > 0).reshape(2, 4)
    assert taught.tolist() == [[False, True, True, False], [True, False, False, False]]
    assert batch.labels.reshape(2, 4)[taught].tolist() == [7, 8, 10]
    assert batch.by_student.tolist() == [False] * 4 + [True] * 4
    with pytest.raises(ValueError, match="no token"):
        collate([Lesson((5, 6), 2)])


def test_reading_prompts_and_answers(stories: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(open_model(stories))
    path = tmp_path / "asked.jsonl"
    rows = [{"prompt": "Once", "response": "upon a time"}, {"text": "Tom ran."}, {"prompt": "x " * 90, "response": "y"}]
    path.write_text("\n\n".join(json.dumps(row) for row in rows))
    first, second = read_records(path, tokenizer, 40)
    assert first.tokens[0] == tokenizer.bos_token_id
    assert first.tokens[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(first.tokens[: first.num_prompt], skip_special_tokens=True).strip() == "Once"
    assert tokenizer.decode(first.tokens[first.num_prompt :], skip_special_tokens=True).strip() == "upon a time"
    assert second.num_prompt == 0
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<answer>"
    (chat, _) = read_records(path, tokenizer, 40)
    assert "<user>Once<answer>" in tokenizer.decode(chat.tokens[: chat.num_prompt])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "asked.jsonl:1 is not valid JSON"),
        ('{"prompt": "a"}', 'asked.jsonl:1 is not an object with "prompt" and "response"'),
        ('{"prompt": 1, "response": "b"}', "is not an object"),
        ("", "nothing to teach within 8 tokens"),
    ],
)
def test_damaged_files_are_refused(text: str, words: str, stories: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(open_model(stories))
    path = tmp_path / "asked.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=words):
        read_records(path, tokenizer, 8)
    with pytest.raises(ValueError, match="cannot be read"):
        read_records(tmp_path / "none.jsonl", tokenizer, 8)


def test_a_model_writes_what_it_would_with_its_whole_past(tmp_path: Path) -> None:
    network = save_model("llama", tmp_path)
    model = open_model(tmp_path)
    writer = writer_of(model, dict(network.state_dict()))
    prompts = [[1, 5, 7], [1, 9], [1, 30]]
    found = write([(writer, 1.0)], prompts, Writing(num_tokens=6, temperature=0.0, by_student=True), seed=0)
    for lesson, prompt in zip(found, prompts, strict=True):
        assert lesson.num_prompt == len(prompt)
        assert lesson.by_student
        tokens = list(prompt)
        for _ in range(6):
            tokens.append(int(network(torch.tensor([tokens])).logits[0, -1].argmax()))
        assert list(lesson.tokens) == tokens


def test_draws_follow_the_mixture() -> None:
    one, other = (torch.randn(4, 4, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    rule = Writing(num_tokens=1, temperature=0.7)
    found = write([(fixed(one), 1.0), (fixed(other), 3.0)], [[2]] * 20000, rule, seed=5)
    counts = torch.bincount(torch.tensor([lesson.tokens[1] for lesson in found]), minlength=4) / 20000
    wanted = 0.25 * torch.softmax(one[2] / 0.7, -1) + 0.75 * torch.softmax(other[2] / 0.7, -1)
    torch.testing.assert_close(counts, wanted, atol=0.02, rtol=0)
    again = write([(fixed(one), 1.0), (fixed(other), 3.0)], [[2]] * 20000, rule, seed=5)
    assert again == found


def test_first_tokens_are_the_likeliest_then_drawn() -> None:
    table = torch.zeros(8, 8)
    table[:, 3] = 0.5
    rule = Writing(num_tokens=40, num_likeliest=4)
    (found,) = write([(fixed(table), 1.0)], [[0]], rule, seed=1)
    assert found.tokens[1:5] == (3, 3, 3, 3)
    assert len(set(found.tokens[5:])) > 3


def test_answers_end_where_the_model_ends_them() -> None:
    table = torch.full((5, 5), -20.0)
    table[0, 1] = table[1, 2] = table[2, 4] = table[3, 3] = table[4, 4] = 20.0
    rule = Writing(num_tokens=6, temperature=0.0, end=4)
    ended, endless = write([(fixed(table), 1.0)], [[0], [3]], rule, seed=0)
    assert ended.tokens == (0, 1, 2, 4)
    assert endless.tokens == (3,) * 7


def test_seeds_come_from_the_whole_vocabulary(tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path)
    found = seeds_of_vocabulary(open_model(tmp_path), 300, seed=0)
    assert {first for first, _ in found} == {1}
    assert len({second for _, second in found}) > 80
    assert found == seeds_of_vocabulary(open_model(tmp_path), 300, seed=0)


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="a prompt is empty"):
        write([(fixed(torch.zeros(2, 2)), 1.0)], [[]], Writing(), seed=0)
    with pytest.raises(ValueError, match="positive share"):
        write([(fixed(torch.zeros(2, 2)), 0.0)], [[1]], Writing(), seed=0)
    with pytest.raises(ValueError, match="share must lie"):
        Mixing(share=1.5)
    with pytest.raises(ValueError, match="temperature"):
        Writing(temperature=-1.0)


def test_a_fixed_share_of_steps_is_on_own_texts() -> None:
    mixer = Mixer(Mixing(share=0.3))
    found = [mixer.choose(step, 4000) for step in range(4000)]
    assert found.count(Source.FRESH) / 4000 == pytest.approx(0.3, abs=0.03)
    assert found.count(Source.REPLAY) == 0
    assert not Mixing(share=0.0).uses_own


def test_the_share_rises_where_held_out_text_gets_worse_and_old_texts_come_back() -> None:
    mixer = Mixer(Mixing(share=0.0, adaptive=True, capacity=4))
    assert mixer.choose(0, 100) is Source.TEXTS
    for loss in (2.0, 2.05, 2.2, 2.31, 2.3):
        mixer.judged(loss)
    assert mixer.share == pytest.approx(0.2)
    mixer.share = 0.5
    assert Source.REPLAY not in {mixer.choose(step, 100) for step in range(100)}, "nothing is kept yet"
    mixer.keep([Lesson((i, i + 1), 1, by_student=True) for i in range(6)])
    assert [lesson.tokens[0] for lesson in mixer.kept] == [2, 3, 4, 5]
    found = [mixer.choose(step, 2000) for step in range(2000)]
    early, late = found[:500], found[-500:]
    assert early.count(Source.FRESH) > 4 * late.count(Source.FRESH)
    assert early.count(Source.REPLAY) < late.count(Source.REPLAY)
    own = (found.count(Source.FRESH) + found.count(Source.REPLAY)) / 2000
    assert own == pytest.approx(0.5, abs=0.04)
    later = Mixer(Mixing(share=0.0, adaptive=True, capacity=4))
    later.restore(json.loads(json.dumps(mixer.state())))
    assert later.kept == mixer.kept
    assert [later.choose(step, 2000) for step in range(2000)] == found
    assert later.replay(7, 3) == mixer.replay(7, 3)

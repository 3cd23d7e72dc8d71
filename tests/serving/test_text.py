"""Answers that arrive token by token: whole characters, stop texts held back, nothing lost at the end."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decoct.model import open_model
from decoct.serving.text import Answer, Text
from tests.engine.running import make_base


class Bytes:
    """A tokenizer whose tokens are bytes: characters beyond ASCII take several."""

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


def written(text: str, stop: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    """The pieces in which a text arrives."""
    answer = Answer(Bytes(), stop)  # type: ignore[arg-type]
    pieces = []
    for token in text.encode():
        pieces.append(answer.add(token))
        if answer.stopped:
            return pieces, True
    return [*pieces, answer.rest()], answer.stopped


@settings(deadline=None)
@given(st.text(st.characters(exclude_characters="\ufffd", exclude_categories=("Cs",)), max_size=30))
def test_pieces_make_the_text(text: str) -> None:
    pieces, stopped = written(text)
    assert "".join(pieces) == text
    assert not stopped
    assert all("\ufffd" not in piece for piece in pieces)


@settings(deadline=None)
@given(st.text("abc", max_size=20), st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3))
def test_nothing_of_a_stop_text_gets_out(text: str, stop: list[str]) -> None:
    pieces, stopped = written(text, tuple(stop))
    ends = [n for n in range(len(text) + 1) if any(text[:n].endswith(each) for each in stop)]
    assert stopped == bool(ends)
    if not ends:
        assert "".join(pieces) == text
        return
    seen = text[: ends[0]]  # the token that completed the first of them
    assert "".join(pieces) == seen[: min(seen.find(each) for each in stop if each in seen)]


def test_half_a_character_at_the_end_is_shown_as_it_is() -> None:
    answer = Answer(Bytes())  # type: ignore[arg-type]
    assert [answer.add(token) for token in "é".encode()[:1]] == [""]
    assert answer.rest() == "\ufffd"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("text"), "llama")


def test_conversations_need_a_template(folder: Path) -> None:
    text = Text(open_model(folder))
    with pytest.raises(ValueError, match="has no chat template; use decoct generate"):
        text.tokens([{"role": "user", "content": "hi"}])
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    template += "{% for m in messages %}{{ m.role }} {{ m.content }}\n{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    text = Text(open_model(folder))
    (folder / "chat_template.jinja").unlink()
    assert text.tokens([{"role": "user", "content": "hi"}]) == text.tokens("user hi\n")
    with pytest.raises(ValueError, match="refuses the conversation: no system"):
        text.tokens([{"role": "system", "content": "hi"}])


def test_every_token_that_ends_a_text(folder: Path) -> None:
    assert Text(open_model(folder)).ends == {2}
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 40]}))
    assert Text(open_model(folder)).ends == {2, 40}


def test_an_empty_prompt(folder: Path) -> None:
    with pytest.raises(ValueError, match="the prompt is empty"):
        Text(open_model(folder)).tokens("")

"""`decoct generate` and `decoct chat`: text on stdout, one JSON object if asked, one line for what is wrong."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

import decoct
from decoct.cli import app
from tests.cli.test_commands import answer, invoke


def test_generate_says_what_it_wrote_and_took(base: Path, compressed: Path) -> None:
    for model in (base, compressed):
        found = answer("generate", model, "--prompt", "abc", "--max-tokens", 7)
        assert found["text"] == decoct.generate(model, "abc", max_tokens=7)[0].text
        assert found["tokens"] <= 7
        assert found["seconds"] >= found["first_token_seconds"] > 0
        assert found["engine"] == "decoct"
        assert "decode loop" in found["about"]
    shown = invoke("generate", compressed, "--prompt", "abc", "--max-tokens", 7)
    assert shown.stdout == found["text"] + "\n"
    assert "tokens in" in shown.stderr
    assert answer("generate", compressed, "--prompt", "abc", "--max-tokens", 7, "--engine", "transformers")["text"]


def test_the_prompt_from_standard_input(base: Path) -> None:
    result = CliRunner().invoke(app, ["generate", str(base), "--prompt", "-", "--max-tokens", "7"], input="abc")
    assert result.stdout == decoct.generate(base, "abc", max_tokens=7)[0].text + "\n"


WRONG: dict[str, tuple[list[str], str, int]] = {
    "an engine that is none": (["--engine", "decot"], "unknown engine 'decot'; did you mean decoct?", 1),
    "a prompt that is too long": (["--context", "3"], "the prompt has 5 tokens, the context is 3; shorten it", 1),
    "too large a context": (["--context", "5000"], "more than the model's limit of 1024 tokens", 1),
    "top_p out of range": (["--top-p", "2"], "top_p must be more than 0, at most 1", 1),
    "no tokens": (["--max-tokens", "0"], "max-tokens", 2),
    "an empty stop text": (["--stop", ""], "a stop text must not be empty", 1),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_use_is_one_line(what: str, base: Path) -> None:
    options, message, code = WRONG[what]
    result = invoke("generate", base, "--prompt", "abcde", *options)
    assert result.exit_code == code
    assert message in " ".join(result.stderr.replace("│", "").split())
    assert result.stdout == ""


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    result = invoke("generate", tmp_path / "nothing", "--prompt", "a")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


TEMPLATE = "{% for m in messages %}{{ m.role[0] }} {{ m.content }}\n{% endfor %}"


def test_chat_remembers_and_forgets(base: Path) -> None:
    template = base / "chat_template.jinja"
    template.write_text(TEMPLATE)
    try:
        said = "abc\nde\n/reset\nabc\n/exit\nnot read"
        options = ["chat", str(base), "--max-tokens", "5", "--temperature", "0"]
        result = CliRunner().invoke(app, options, input=said)
        assert result.exit_code == 0, result.stderr
        ask = [{"role": "user", "content": "abc"}]
        first = decoct.generate(base, [ask], max_tokens=5)[0].text
        ask += [{"role": "assistant", "content": first}, {"role": "user", "content": "de"}]
        second = decoct.generate(base, [ask], max_tokens=5)[0].text
        assert result.stdout == f"{first}\n{second}\n{first}\n"
        small = CliRunner().invoke(app, [*options, "--context", "20"], input="abc\nabc\n/reset\nabc\n")
        assert "/reset forgets the conversation" in small.stderr
        assert small.stdout == f"{first}\n{first}\n"
        result = invoke("chat", base)
        assert (result.exit_code, result.stdout) == (0, ""), "nothing was said"
    finally:
        template.unlink()


def test_chat_without_a_template(base: Path) -> None:
    result = CliRunner().invoke(app, ["chat", str(base)])
    assert result.exit_code == 1, "said at once, before anything is typed"
    assert "has no chat template; use decoct generate" in result.stderr

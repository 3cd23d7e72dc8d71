"""Asking a model behind a URL: nothing is paid for twice, limits hold, failures end in one line."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from decoct.blackbox import Answer, Asker, InContext, Limit, LimitReached, Question, Server, StepByStep
from decoct.blackbox.client import call
from decoct.blackbox.filters import Filter, similarity
from decoct.blackbox.make import expand_prompts
from decoct.blackbox.tasks import Example, Instruct, read_examples, read_prompts
from decoct.cli import app
from tests.blackbox.server import completion, echo, serve

QUESTION = Question((("user", "hello"),), max_tokens=20)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["ask", *(str(each) for each in arguments)])


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("first prompt\nsecond prompt\n\nfirst prompt\nthird prompt\n")
    return path


def options(url: str, prompts: Path, out: Path) -> list[object]:
    return [url, "--model", "m", "--prompts", prompts, "-o", out]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_data_set_is_written_and_asked_for_once(
    prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "secret-key")
    out = tmp_path / "asked.jsonl"
    with serve() as served:
        arguments = [*options(served.url, prompts, out), "--key-from", "MY_KEY", "--json"]
        found = json.loads(run(*arguments).stdout)
        assert found["records"] == found["calls"] == found["prompts"] == 3
        assert (found["tokens_in"], found["tokens_out"]) == (30, 15)
        assert read(out)[0] == {"prompt": "first prompt", "response": "tpmorp tsrif"}
        assert {h["Authorization"] for h in served.headers} == {"Bearer secret-key"}
        assert len({h["Idempotency-Key"] for h in served.headers}) == 3
        before = out.read_bytes()
        out.unlink()
        again = json.loads(run(*arguments).stdout)
        assert again["calls"] == 0
        assert again["tokens_in"] == 30
        assert out.read_bytes() == before
        assert len(served.bodies) == 3
        run(*arguments, "--answers", "2")
        assert len(served.bodies) == 6, "only the second answers are asked for"
    kept = [path.read_text() for path in (tmp_path / "asked.jsonl.cache").rglob("*.json")]
    assert len(kept) == 6
    assert not any("secret-key" in text for text in kept)


def test_what_was_answered_survives_a_crash(prompts: Path, tmp_path: Path) -> None:
    """The process is killed while the third call hangs; the two answers before it are not asked for again."""
    out, hang = tmp_path / "asked.jsonl", tmp_path / "hang"
    hang.touch()

    def reply(body: dict[str, Any]) -> tuple[int, Any]:
        while "third" in body["messages"][-1]["content"] and hang.exists():
            time.sleep(0.01)
        return echo(body)

    with serve(reply) as served:
        arguments = [str(each) for each in (*options(served.url, prompts, out), "--parallel", "1")]
        code = "from decoct.cli import main; main()"
        process = subprocess.Popen([sys.executable, "-c", code, "ask", *arguments], env={**os.environ, "NO_COLOR": "1"})
        while len(served.bodies) < 3:
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        hang.unlink()
        assert not out.exists()
        assert run(*arguments).exit_code == 0
        asked = [body["messages"][-1]["content"] for body in served.bodies]
        assert asked == ["first prompt", "second prompt", "third prompt", "third prompt"]
        third = {h["Idempotency-Key"] for h, text in zip(served.headers, asked, strict=True) if "third" in text}
        assert len(third) == 1, "a server that knows such keys charges once"
    assert len(read(out)) == 3


def test_a_busy_server_is_asked_again_after_a_while() -> None:
    answers = iter([(429, {"error": {"message": "slow down"}}), (503, b"busy"), (200, completion("at last"))])
    waits: list[float] = []
    with serve(lambda _: next(answers)) as served:
        served.extra = {"Retry-After": "7"}
        assert call(Server(served.url, "m"), QUESTION, waits.append).text == "at last"
        assert waits == [7.0, 7.0]
        served.extra, served.reply = {}, lambda _: (500, b"")
        waits.clear()
        with pytest.raises(ValueError, match=r"gave no answer in 6 tries \(500 "):
            call(Server(served.url, "m"), QUESTION, waits.append)
        assert len(waits) == 5
        assert all(2 * earlier >= 2.0**i for i, earlier in enumerate(waits))
        assert waits[4] > waits[0]


def test_what_cannot_be_mended_by_waiting_is_said_at_once(prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "asked.jsonl"
    for reply, words in (
        ((401, {"error": {"message": "wrong key"}}), "refuses: 401 wrong key"),
        ((200, b"<html>"), "something else than JSON"),
        ((200, {"answer": 1}), "no choices[0].message.content"),
    ):
        with serve(lambda _, reply=reply: reply) as served:
            result = run(*options(served.url, prompts, out), "--parallel", "1")
            assert result.exit_code == 1
            assert result.stderr.count("\n") == 1
            assert words in " ".join(result.stderr.split())
            assert len(served.bodies) == 1
    assert not out.exists()


def test_a_server_that_is_not_there(prompts: Path) -> None:
    with pytest.raises(ValueError, match=r"gave no answer in 2 tries \(.*refused"):
        call(Server("http://127.0.0.1:9/v1", "m", num_tries=2), QUESTION, lambda _: None)
    with pytest.raises(ValueError, match="is no URL"):
        Server("localhost:8000", "m")


def test_limits_stop_before_they_are_passed(prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "asked.jsonl"
    with serve() as served:
        arguments = [*options(served.url, prompts, out), "--answer-tokens", "20", "--parallel", "1", "--json"]
        found = json.loads(run(*arguments, "--max-tokens", "60").stdout)
        # 12 + 20 at most for the first, 15 in truth; then 15 + 13 + 20, 30 in truth; then 30 + 12 + 20 is too much.
        assert (found["records"], found["unanswered"], found["calls"]) == (2, 1, 2)
        found = json.loads(run(*arguments, "--max-tokens", "60").stdout)
        assert (found["calls"], found["tokens_in"] + found["tokens_out"]) == (0, 30), "earlier runs count"
        prices = ["--price-in", "1000", "--price-out", "2000", "--max-cost"]
        found = json.loads(run(*arguments, *prices, "0.09").stdout)
        assert (found["calls"], found["unanswered"]) == (0, 1)
        found = json.loads(run(*arguments, *prices, "0.1").stdout)
        assert (found["calls"], found["unanswered"]) == (1, 0)
        assert found["cost"] == pytest.approx(0.06)
        assert "limit was reached" in run(*options(served.url, prompts, tmp_path / "b"), "--max-tokens", 5).stderr
    with pytest.raises(ValueError, match="needs prices"):
        Limit(max_cost=1.0)


def test_calls_that_are_under_way_count_against_limits(tmp_path: Path) -> None:
    with serve(lambda body: (time.sleep(0.2), echo(body))[1]) as served:
        asker = Asker(Server(served.url, "m"), tmp_path, Limit(max_tokens=60))
        questions = [Question((("user", f"number {n}"),), max_tokens=20) for n in range(8)]
        with asker:
            found = asker.ask_all(questions, parallel=8)
        assert sum(answer is not None for answer in found) == len(served.bodies) == 2
        with pytest.raises(LimitReached):
            asker.ask(Question((("user", "x" * 41),), max_tokens=20))


def test_one_cache_serves_one_run_at_a_time(tmp_path: Path) -> None:
    server = Server("http://127.0.0.1:9/v1", "m")
    with Asker(server, tmp_path, Limit()), pytest.raises(ValueError, match="in use by another run"):
        Asker(server, tmp_path, Limit()).__enter__()
    (tmp_path / "ab").mkdir()
    (tmp_path / "ab" / "x.json").write_text("{}")
    with pytest.raises(ValueError, match="no cached answer; delete it"):
        Asker(server, tmp_path, Limit())


def test_the_same_question_twice_is_one_call(tmp_path: Path) -> None:
    with serve() as served, Asker(Server(served.url, "m"), tmp_path, Limit()) as asker:
        one, other = asker.ask_all([QUESTION, QUESTION], parallel=2)
        assert one == other == Answer("olleh", True, 10, 5)
        assert len(served.bodies) == 1


def test_answers_that_are_not_worth_it_are_left_out_and_counted(tmp_path: Path) -> None:
    texts = {
        "good": completion("a fine answer"), "long": completion("a", "length"), "sorry": completion("I\u2019m sorry"),
        "same": completion("SAME"), "empty": completion("  "), "brief": completion("no"),
    }  # fmt: skip
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "asked.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": each}) + "\n" for each in texts))
    with serve(lambda body: (200, texts[body["messages"][-1]["content"]])) as served:
        arguments = [*options(served.url, prompts, out), "--min-characters", "3"]
        assert json.loads(run(*arguments, "--json").stdout)["taken_out"] == {
            "cut off": 1, "refusal": 1, "repeats the prompt": 1, "too short": 2,
        }  # fmt: skip
        assert [record["prompt"] for record in read(out)] == ["good"]
        assert "left out: 1 cut off, 1 refusal" in run(*arguments).stdout
        run(*arguments, "--refusals")
        assert [record["prompt"] for record in read(out)] == ["good", "sorry"]
        prompts.write_text('{"prompt": "empty"}')
        failed = run(*arguments)
        assert failed.exit_code == 1
        assert "none of 1 answers is worth learning from (1 too short)" in " ".join(failed.stderr.split())
    keep = Filter()
    assert [keep.passes("p", Answer("x", True, 1, 1)) for _ in range(2)] == [True, False]
    assert keep.taken_out == {"duplicate": 1}


def test_step_by_step_teaches_rationale_and_label(prompts: Path, tmp_path: Path) -> None:
    examples, out = tmp_path / "examples.jsonl", tmp_path / "asked.jsonl"
    examples.write_text('{"prompt": "1+1?", "response": "One more than one.\\nAnswer: 2"}\n')

    def reply(body: dict[str, Any]) -> tuple[int, Any]:
        assert [m["content"] for m in body["messages"][1:3]] == ["1+1?", "One more than one.\nAnswer: 2"]
        prompt = body["messages"][-1]["content"]
        return 200, completion("no form" if "second" in prompt else f"Because {prompt}.\nAnswer: yes")

    with serve(reply) as served:
        found = json.loads(
            run(*options(served.url, prompts, out), "--kind", "steps", "--examples", examples, "--json").stdout
        )
    assert found["taken_out"] == {"another form than asked for": 1}
    assert read(out)[:2] == [
        {"prompt": "[label] first prompt", "response": "yes", "weight": 1.0},
        {"prompt": "[rationale] first prompt", "response": "Because first prompt.", "weight": 1.0},
    ]
    records = StepByStep(rationale_weight=0.3).records("p", Answer("so\nAnswer: 4", True, 1, 1), 0)
    assert records is not None
    assert [record["weight"] for record in records] == [1.0, 0.3]


def test_examples_in_the_context(prompts: Path, tmp_path: Path) -> None:
    shown = tuple(Example(f"q{n}", f"a{n}") for n in range(5))
    task = InContext(examples=shown, num_examples=2)
    for prompt in ("q0", "other"):
        messages = task.messages(prompt, 0)
        assert len(messages) == 5
        assert prompt not in [text for _, text in messages[:-1]]
        (record,) = task.records(prompt, Answer(" z ", True, 1, 1), 0) or [{}]
        assert (
            record["prompt"] == "\n\n".join(f"{messages[i][1]}\n{messages[i + 1][1]}" for i in (0, 2)) + f"\n\n{prompt}"
        )
        assert record["response"] == "z"
    (plain,) = InContext(examples=shown, keep_examples=False).records("p", Answer("z", True, 1, 1), 0) or [{}]
    assert plain["prompt"] == "p"
    with pytest.raises(ValueError, match="num_examples is 4 and there are 3 examples"):
        InContext(examples=shown[:3])
    result = run(*options("http://127.0.0.1:9", prompts, tmp_path / "o"), "--kind", "in_context")
    assert result.exit_code == 2
    assert "--examples" in result.stderr


def test_more_prompts_like_the_given_ones(tmp_path: Path) -> None:
    seen: list[str] = []

    def reply(body: dict[str, Any]) -> tuple[int, Any]:
        seen.append(body["messages"][-1]["content"])
        count = len(seen)
        return 200, completion(f"- Write a poem about cats\n- Task {count} on topic {count * 7}\nnot one\n-  ")

    with serve(reply) as served, Asker(Server(served.url, "m"), tmp_path, Limit()) as asker:
        found = expand_prompts(asker, ["Write a poem about dogs", "Count the apples"], 4)
        assert found == ["Write a poem about dogs", "Count the apples", "Task 1 on topic 7", *found[3:]]
        assert len(found) <= 4
        assert "- Count the apples" in seen[0]
        assert expand_prompts(asker, ["Write a poem about dogs", "Count the apples"], 4) == found
    assert similarity("a b c d", "a x c d") == pytest.approx(2 * 3 / 8)
    assert similarity("", "a") == 0


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    with pytest.raises(ValueError, match="cannot be read"):
        read_prompts(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match="has no prompts"):
        read_prompts(path)
    path.write_text('{"prompt": "x"}\n{"prompt": 3}\n')
    with pytest.raises(ValueError, match='no JSON object with a text "prompt"'):
        read_prompts(path)
    with pytest.raises(ValueError, match='no JSON object with a text "response"'):
        read_examples(path)
    assert Instruct().messages("x", 0) == [("user", "x")]

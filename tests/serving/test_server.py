"""The server, asked by the official client over loopback; by clients that hang up; and by a fuzzer."""

import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import decoct
from decoct.serving.batch import Batch
from decoct.serving.server import Server, open_server
from decoct.serving.worker import Limits
from tests.engine.running import make_base

TEMPLATE = "{% for m in messages %}{{ m.role[0] }} {{ m.content }}\n{% endfor %}"
ASK: Any = [{"role": "user", "content": "abc"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that never ends by itself, so that answers are as long as asked."""
    folder = make_base(tmp_path_factory.mktemp("server"), "llama", max_position_embeddings=512, eos_token_id=None)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    settings_ = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings_, "eos_token": None}))
    return folder


class Running:
    """A server in a thread."""

    def __init__(self, server: Server) -> None:
        self.server, self.address = server, server.address
        self.client = openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0, timeout=300)
        self.thread = threading.Thread(target=server.run)
        self.thread.start()
        while self.get("/health")[0] != 200:
            time.sleep(0.05)

    def get(self, path: str) -> tuple[int, str]:
        status, body = self.raw(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        return status, body

    def post(self, path: str, body: bytes) -> tuple[int, Any]:
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        status, text = self.raw(head.encode() + body)
        return status, json.loads(text)

    def raw(self, sent: bytes) -> tuple[int, str]:
        with self.connect() as connection:
            connection.sendall(sent)
            found = b"".join(iter(lambda: connection.recv(65536), b""))
        head, _, body = found.decode().partition("\r\n\r\n")
        return int(head.split()[1]), body

    def connect(self) -> socket.socket:
        where = urlsplit(self.address)
        return socket.create_connection((where.hostname or "", where.port or 0), timeout=300)

    def metric(self, name: str) -> float:
        lines = self.get("/metrics")[1].splitlines()
        return next((float(line.split()[-1]) for line in lines if line.startswith(name + " ")), 0.0)

    def stop(self) -> None:
        self.client.close()
        self.server.stop()
        self.thread.join(30)
        assert not self.thread.is_alive()


@pytest.fixture(scope="module")
def running(folder: Path) -> Iterator[Running]:
    it = Running(open_server(folder, name="tiny", port=0, num_seats=2, context=256))
    yield it
    it.stop()


def refused(running: Running, **changes: Any) -> openai.APIStatusError:
    with pytest.raises(openai.APIStatusError) as caught:
        running.client.chat.completions.create(**{"model": "tiny", "messages": ASK, **changes})
    return caught.value


def test_a_conversation_is_answered(running: Running, folder: Path) -> None:
    expected = decoct.generate(folder, [ASK], max_tokens=9)[0]
    found = running.client.chat.completions.create(model="tiny", messages=ASK, max_tokens=9, temperature=0)
    assert found.choices[0].message.content == expected.text
    assert found.choices[0].finish_reason == "length"
    assert found.usage is not None
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (expected.prompt_tokens, 9)
    parts: Any = [{"role": "user", "content": [{"type": "text", "text": "ab"}, {"type": "text", "text": "c"}]}]
    again = running.client.chat.completions.create(model="tiny", messages=parts, max_completion_tokens=9, temperature=0)
    assert again.choices[0].message.content == expected.text


def test_a_stream_makes_the_same_text(running: Running, folder: Path) -> None:
    expected = decoct.generate(folder, [ASK], max_tokens=9)[0]
    stream = running.client.chat.completions.create(
        model="tiny", messages=ASK, max_tokens=9, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == expected.text
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 9
    assert len(chunks) > 5, "it comes in pieces"


def test_texts_are_gone_on_with(running: Running, folder: Path) -> None:
    prompts = ["abc", "Hello"]
    expected = [each.text for each in decoct.generate(folder, prompts, max_tokens=8)]
    found = running.client.completions.create(model="tiny", prompt=prompts, max_tokens=8, temperature=0)
    assert [choice.text for choice in found.choices] == expected
    stop = expected[0][3:5]
    ended = running.client.completions.create(model="tiny", prompt="abc", max_tokens=8, temperature=0, stop=stop)
    assert (ended.choices[0].text, ended.choices[0].finish_reason) == (expected[0][: expected[0].index(stop)], "stop")
    stream = running.client.completions.create(model="tiny", prompt=prompts, max_tokens=8, temperature=0, stream=True)
    texts = ["", ""]
    for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == expected
    ids = running.client.completions.create(model="tiny", prompt=[3, 4, 5], max_tokens=2, extra_body={"top_k": 3})
    assert ids.usage is not None
    assert ids.usage.prompt_tokens == 3


def test_seeds(running: Running) -> None:
    create = running.client.chat.completions.create
    found = [create(model="tiny", messages=ASK, max_tokens=20, seed=seed) for seed in (1, 1, 2)]
    texts = {each.choices[0].message.content for each in found}
    assert len(texts) == 2


def test_models(running: Running) -> None:
    assert [model.id for model in running.client.models.list()] == ["tiny"]
    assert running.client.models.retrieve("tiny").owned_by == "decoct"
    with pytest.raises(openai.NotFoundError):
        running.client.models.retrieve("other/model")


@pytest.mark.parametrize(
    ("changes", "status", "message"),
    [
        ({"model": "other"}, 404, "there is no model 'other' here, only 'tiny'"),
        ({"messages": [{"role": "user", "content": "a" * 300}]}, 400, "tokens, the context is 256"),
        ({"max_tokens": 250, "messages": [{"role": "user", "content": "a" * 30}]}, 400, "ask for at most"),
        ({"max_tokens": 10**30}, 400, "this server's limit is 256"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "tool", "content": "a"}]}, 400, "messages.0.role"),
        ({"temperature": -1}, 400, "temperature"),
        ({"top_p": 0}, 400, "top_p"),
        ({"stop": ""}, 400, "stop"),
        ({"n": 2}, 400, "n is not supported by this server; leave it out"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "tools is not supported"),
        ({"extra_body": {"tempreature": 1}}, 400, "tempreature"),
    ],
)
def test_refusals_say_what_is_wrong(running: Running, changes: Any, status: int, message: str) -> None:
    error = refused(running, **changes)
    assert error.status_code == status
    assert message in error.body["message"]  # type: ignore[index]
    assert error.type == "invalid_request_error"


def test_addresses_and_verbs(running: Running) -> None:
    assert running.get("/v1/nothing")[0] == 404
    status, body = running.get("/v1/completions")
    assert (status, "error" in json.loads(body)) == (405, True)
    status, error = running.post("/v1/completions", b'{"model": "tiny", "prompt": "%s"}' % (b"a" * (5 << 20)))
    assert (status, "longer than" in error["error"]["message"]) == (413, True)


def test_several_at_once_are_written_together(running: Running, folder: Path) -> None:
    """More clients than seats; each gets what it gets alone."""
    prompts = [text * 3 for text in ("abc", "de", "xyz", "q", "hello", "no")]
    expected = [each.text for each in decoct.generate(folder, prompts, max_tokens=30)]

    def ask(prompt: str) -> str:
        found = running.client.completions.create(model="tiny", prompt=prompt, max_tokens=30, temperature=0)
        return found.choices[0].text

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(ask, prompts)) == expected


def soon(condition: Callable[[], bool]) -> bool:
    """Whether it comes true within a while."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


def idle(running: Running) -> bool:
    """Whether every seat is free again, soon."""
    return soon(lambda: running.metric("decoct_running") == running.metric("decoct_waiting") == 0)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_frees_its_seat(running: Running, stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are slowed, so that the answer would take far longer than the server needs to notice."""
    step = Batch.step

    def slow_step(batch: Batch) -> bool:
        time.sleep(0.02)
        return step(batch)

    monkeypatch.setattr(Batch, "step", slow_step)
    body = json.dumps({"model": "tiny", "prompt": "abc", "max_tokens": 250, "stream": stream}).encode()
    before = running.metric("decoct_generated_tokens_total")
    connection = running.connect()
    connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    if stream:
        assert b"200 OK" in connection.recv(4096)
    else:
        assert soon(lambda: running.metric("decoct_running") == 1)
    connection.close()
    assert idle(running)
    assert running.metric("decoct_generated_tokens_total") - before < 250


def test_counts(running: Running) -> None:
    running.client.completions.create(model="tiny", prompt="abc", max_tokens=4)
    text = running.get("/metrics")[1]
    assert 'decoct_requests_total{status="200"}' in text
    assert running.metric("decoct_seats") == 2
    assert running.metric("decoct_first_token_seconds_count") >= 1
    buckets = [int(line.split()[-1]) for line in text.splitlines() if line.startswith("decoct_answer_seconds_bucket")]
    assert buckets == sorted(buckets)
    assert buckets[-1] == running.metric("decoct_answer_seconds_count")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=6,
)
KEYS = (
    "messages",
    "prompt",
    "max_tokens",
    "temperature",
    "top_p",
    "stop",
    "stream",
    "seed",
    "n",
    "stream_options",
    "model",
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(data=st.data())
def test_malformed_requests_are_refused_politely(running: Running, data: st.DataObject) -> None:
    """Whatever is sent: an answer or an OpenAI-style error, never a 500, and the server goes on."""
    path = data.draw(st.sampled_from(["/v1/chat/completions", "/v1/completions"]))
    whole = {"model": "tiny", "messages": ASK, "prompt": "abc", "max_tokens": 2}
    del whole["prompt" if "chat" in path else "messages"]
    body = data.draw(
        st.binary(max_size=40)
        | JSON.map(lambda value: json.dumps(value).encode())
        | st.dictionaries(st.sampled_from(KEYS), JSON, min_size=1, max_size=3).map(
            lambda changes: json.dumps({**whole, **changes}).encode()
        )
        | st.integers(0, 60).map(lambda cut: json.dumps(whole).encode()[:cut])
    )
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    status, text = running.raw(head.encode() + body)
    assert status in (200, 400, 404), text
    if status != 200:
        error = json.loads(text)["error"]
        assert error["message"]
        assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"model": "tiny", "prompt": "\\ud800"}',
        b'{"model": "\\udc00", "prompt": "a"}',
        b'{"a\\ud800": 1}',
        b'{"model": "tiny", "prompt": [1, 999999]}',
        b'{"model": "tiny", "prompt": []}',
        b'{"model": "tiny", "prompt": [-1]}',
        b'{"model": "tiny", "prompt": "a", "temperature": NaN}',
        b"\xff\xfe",
    ],
)
def test_nasty_bodies(running: Running, body: bytes) -> None:
    status, answer = running.post("/v1/completions", body)
    assert status in (400, 404)
    assert answer["error"]["message"]


def test_limits_and_time_outs(folder: Path) -> None:
    limits = Limits(max_tokens=200, max_waiting=1, seconds=0.4)
    it = Running(open_server(folder, name="tiny", port=0, num_seats=1, context=256, limits=limits))
    try:
        assert "limit is 200" in refused(it, max_tokens=201).body["message"]  # type: ignore[index]

        def ask(_: int) -> int:
            long = {"model": "tiny", "prompt": "abc", "max_tokens": 200}
            return it.post("/v1/completions", json.dumps(long).encode())[0]

        with ThreadPoolExecutor(6) as pool:
            found = sorted(pool.map(ask, range(6)))
        assert 429 in found, "one runs, one waits, the others are turned away"
        assert set(found) <= {200, 429, 504}
        assert idle(it)
    finally:
        it.stop()


def test_a_server_that_cannot_begin(folder: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ValueError, match="choose another --port"):
        open_server(folder, name="tiny", port=taken.getsockname()[1])
    with pytest.raises(ValueError, match="use that engine's own server"):
        open_server(folder, name="tiny", engine="llama.cpp", port=0)
    with pytest.raises(ValueError, match="nothing"):
        open_server(tmp_path / "nothing", name="tiny", port=0)


def test_missing_packages_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ValueError, match=r"pip install 'decoct\[serve\]'"):
        open_server(folder, name="tiny", port=0)
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(ValueError, match=r"pip install 'decoct\[llama-cpp\]'"):
        decoct.generate(folder / "model.gguf", "a", engine="llama.cpp")


def test_a_short_soak(running: Running) -> None:
    """What `bench/soak.py` does for minutes: many clients, some of which hang up; nothing is left behind."""
    spec = spec_from_file_location("soak", Path(__file__).resolve().parents[2] / "bench" / "soak.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    soak = module.Soak(urlsplit(running.address).port, "tiny", seconds=3)
    with ThreadPoolExecutor(5) as pool:
        list(pool.map(soak.client, range(5)))
    assert soak.wrong == []
    assert min(soak.counts[what] for what in ("right", "refused", "hung up")) > 0
    assert idle(running)

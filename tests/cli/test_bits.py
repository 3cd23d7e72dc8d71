"""`--bits`, `--size` and `--write-recipe` on the command line."""

import re
from pathlib import Path

import pytest

pytest.importorskip("scipy", reason="searching is an extra: pip install 'decoct[search]'")

import yaml

from tests.cli.test_commands import answer, invoke
from tests.engine.running import make_base

SMALL = ["--set", "gptq.group_size=8", "--set", "rtn.group_size=8", "--set", "search.generations=1"]
SMALL += ["--set", "search.offspring=2", "--set", "search.widths=[2, 4]"]
TOKENS = ["--set", "data.num_sequences=4", "--set", "data.sequence_length=16"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("bits"), "llama-tied")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("engine.estimate", "search.plan"):
        monkeypatch.setattr(f"decoct.{module}.product_rate", lambda _: 1e11)


def test_plan(base: Path) -> None:
    command = ["plan", base, "--bits", 5, *SMALL, *TOKENS, "--data", base.parent / "text.txt"]
    found = answer(*command)
    assert found["search"]["levels"] == [2, 4]
    assert found["search"]["matrices"] == 21
    assert found["search"]["wanted_bits"] == 5
    shown = invoke(*command).stdout
    for words in ("gptq's bits, from 2, 4, for 12 groups of 21", "5.00 bits per weight", "4.00 to 6.00 can be had"):
        assert words in shown


def test_compress(base: Path, tmp_path: Path) -> None:
    command = ["compress", base, "--bits", 5, *SMALL, *TOKENS, "--data", base.parent / "text.txt"]
    result = invoke(*command, "-o", tmp_path / "out", "--write-recipe", tmp_path / "found.yaml")
    assert result.exit_code == 0, result.stderr
    for words in ("compressing every searched matrix with 2, 4 bits", "gradients, block 1", "generation 1", "chose"):
        assert words in result.stderr
    recipe = yaml.safe_load((tmp_path / "found.yaml").read_text())
    assert {rule.get("gptq", {}).get("bits") for rule in recipe["stages"][0]["blocks"][0]["linear"]} == {None, 2, 4}
    assert invoke("plan", base, tmp_path / "found.yaml").exit_code == 0


def test_wrong_use(base: Path, tmp_path: Path) -> None:
    text = ["--data", base.parent / "text.txt"]
    both = invoke("compress", base, "--bits", 3, "--size", "1MiB", *text, "-o", tmp_path / "out")
    assert both.exit_code == 2
    assert "give one of --bits" in both.stderr
    low = invoke("compress", base, "--bits", 1.2, *SMALL, *TOKENS, *text, "-o", tmp_path / "out")
    assert low.exit_code == 1
    assert low.stderr.startswith("error: 1.2 bits cannot be met")
    assert low.stderr.count("\n") == 1


TARGETS = {
    ("--bits", "abc"): "'abc' is no average of bits; give a number above 0 such as 3.3",
    ("--bits", ""): "'' is no average of bits",
    ("--bits", "nan"): "'nan' is no average of bits",
    ("--bits", "inf"): "'inf' is no average of bits",
    ("--bits", "-3"): "'-3' is no average of bits",
    ("--sparsity", "abc"): "'abc' is no sparsity; give a fraction between 0 and 1 such as 0.6",
    ("--sparsity", "nan"): "'nan' is no sparsity",
    ("--sparsity", "50"): "'50' is no sparsity",
    ("--size", "huge"): "'huge' is not a size; write it as 8GiB or 500MB",
    ("--size", "nan"): "'nan' is not a size",
    ("--size", "0"): "'0' leaves no room; give a size such as 60MiB",
}


@pytest.mark.parametrize(("option", "value"), TARGETS, ids=str)
@pytest.mark.parametrize("command", ["plan", "compress"])
def test_a_target_that_is_none_is_one_line(command: str, option: str, value: str, base: Path, tmp_path: Path) -> None:
    out = ["-o", tmp_path / "out"] if command == "compress" else []
    result = invoke(command, base, option, value, *out)
    assert result.exit_code == 2, (result.exception, result.stderr)
    assert result.stderr.startswith(f"error: {option}: {TARGETS[option, value]}")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


ABOVE = {
    ("--bits", "9"): r"error: 9 bits cannot be met: .* take 4\.00 bits .*, 6\.00 with 4 bits; ask for at most 6\.00\n",
    (
        "--size",
        "1GiB",
    ): r"error: 1\.0 GiB is more than the result can take: .* KiB with 4 bits .*; leave --size out, .*\n",
}


@pytest.mark.parametrize(("option", "value"), ABOVE, ids=str)
@pytest.mark.parametrize("command", ["plan", "compress"])
def test_more_than_can_be_had(command: str, option: str, value: str, base: Path, tmp_path: Path) -> None:
    out = ["-o", tmp_path / "out"] if command == "compress" else []
    text = ["--data", base.parent / "text.txt"]
    result = invoke(command, base, option, value, *SMALL, *TOKENS, *text, *out)
    assert result.exit_code == 1, (result.exception, result.stderr)
    assert re.fullmatch(ABOVE[option, value], result.stderr)
    assert command != "plan" or invoke("plan", base, "--bits", 6.005, *SMALL, *TOKENS, *text).exit_code == 0, "rounded"


UNSEARCHABLE = {
    ("--bits", "4"): "bits are chosen for matrices, and this recipe has no blocks stage that compresses any; leave",
    ("--sparsity", "0.5"): "sparsities are chosen for matrices, and this recipe has no blocks stage",
}


@pytest.mark.parametrize("target", UNSEARCHABLE, ids=str)
def test_a_recipe_without_matrices_to_choose_for(target: tuple[str, str], base: Path) -> None:
    text = ["--data", base.parent / "text.txt"]
    result = invoke("plan", base, "--preset", "kv4", "--set", "kivi.group_size=8", *target, *TOKENS, *text)
    assert result.exit_code == 1, (result.exception, result.stderr)
    assert result.stderr.startswith(f"error: {UNSEARCHABLE[target]}")
    assert result.stderr.count("\n") == 1


def test_widths_that_the_method_does_not_have_name_their_key(base: Path) -> None:
    text = ["--data", base.parent / "text.txt"]
    result = invoke("plan", base, "--bits", 3.3, *SMALL, "--set", "search.widths=[3, 9]", *TOKENS, *text)
    assert result.exit_code == 1, (result.exception, result.stderr)
    assert result.stderr == "error: search.widths: gptq's bits must be 2 to 8, not 9\n"

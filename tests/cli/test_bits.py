"""`--bits`, `--size` and `--write-recipe` on the command line."""

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
    assert invoke("plan", base, "--size", "huge", *text).exit_code == 2

"""Mistyped commands, settings and recipes: exit code 2, one message that says what to do, nothing written."""

from pathlib import Path

import pytest

from tests.cli.test_commands import invoke

WRONG_USE: dict[str, tuple[list[str], str]] = {
    "unknown preset": (["plan", "BASE", "--preset", "w44"], "no preset or recipe file 'w44'; did you mean 'w4'?"),
    "no recipe": (["plan", "BASE"], "give a recipe file, or a preset"),
    "a preset without --preset": (["plan", "BASE", "w4"], "--preset w4"),
    "a recipe that is not there": (["plan", "BASE", "mine.yaml"], "recipe mine.yaml does not exist"),
    "no -o": (["compress", "BASE", "--preset", "w4"], "-o OUT"),
    "a setting without =": (["plan", "BASE", "--preset", "w4", "--set", "gptq.bits"], "write it as"),
    "a setting without a scope": (["plan", "BASE", "--preset", "w4", "--set", "bits=3"], "rtn.bits=3 or gptq.bits=3"),
    "a setting of a method that is not there": (
        ["plan", "BASE", "--preset", "w4", "--set", "wanda.sparsity=0.5"], "this recipe has no wanda",
    ),
    "a misspelt setting": (["plan", "BASE", "--preset", "w4", "--set", "gptq.bit=3"], "did you mean 'bits'?"),
    "a misspelt data setting": (["plan", "BASE", "--preset", "w4", "--set", "data.num_seq=3"], "did you mean"),
    "bits out of range": (["plan", "BASE", "--preset", "w4", "--set", "gptq.bits=9"], "9"),
    "a word for a number": (["plan", "BASE", "--preset", "w4", "--set", "gptq.bits=four"], "gptq.bits"),
    "no size": (["plan", "BASE", "--preset", "w4", "--memory", "much"], "'much' is not a size"),
    "minutes where nothing trains": (
        ["plan", "BASE", "--preset", "w4", "--minutes", "5"], "error: nothing in this recipe trains",
    ),
    "minutes, what to do": (["plan", "BASE", "--preset", "w4", "--minutes", "5"], "leave --minutes out"),
    "a teacher where nothing trains": (
        ["plan", "BASE", "--preset", "w4", "--set", "teacher=x"], "leave teacher out",
    ),
    "no tokens": (["plan", "BASE", "--preset", "w4", "--set", "data.num_sequences=0"], "num_sequences"),
    "broken YAML in a setting": (["plan", "BASE", "--preset", "w4", "--set", "gptq.bits=[3"], "gptq.bits=[3"),
    "unknown option": (["plan", "BASE", "--presets", "w4"], "--preset"),
    "unknown command": (["squeeze", "BASE"], "squeeze"),
    "a dtype that is none": (["evaluate", "BASE", "--text", "x", "--dtype", "int8"], "must be float32 or bfloat16"),
    "an export format that is none": (["export", "BASE", "--to", "gguff", "-o", "out"], "gguff"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG_USE)
def test_wrong_use_exits_2(what: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, message = WRONG_USE[what]
    result = invoke(*(str(base) if each == "BASE" else each for each in arguments))
    assert result.exit_code == 2, (result.exception, result.stderr)
    plain = "".join(result.stderr.replace("│", "").split())
    assert "".join(message.split()) in plain
    assert result.stdout == ""
    assert not list(tmp_path.iterdir())


RECIPES: dict[str, tuple[str, str]] = {
    "a misspelt key": ("stagess: []", "unknown key 'stagess'; did you mean 'stages'?"),
    "a misspelt method": ("stages: [{blocks: [{linear: {gtpq: {}}}]}]", "unknown key 'gtpq'; did you mean 'gptq'?"),
    "a misspelt field": ("stages: [{blocks: [{linear: {gptq: {group: 8}}}]}]", "did you mean 'group_size'?"),
    "a misspelt step": ("stages: [{blocks: [{linaer: {gptq: {}}}]}]", "did you mean 'linear'?"),
    "a misspelt stage": ("stages: [{block: []}]", "did you mean 'blocks'?"),
    "no stages": ("data: {seed: 1}", "a recipe needs stages"),
    "no steps": ("stages: [{blocks: []}]", "must be a list of steps"),
    "a list": ("[1, 2]", "must be a mapping with the key stages"),
    "no YAML": ("stages: [", "is not valid YAML"),
    "a tab": ("stages:\n\t- blocks: []", "is not valid YAML"),
    "two methods in a rule": ("stages: [{blocks: [{linear: {rtn: {}, gptq: {}}}]}]", "give exactly one method"),
    "no method in a rule": ("stages: [{blocks: [{linear: {match: x}}]}]", "give exactly one method"),
    "a method that is a number": ("stages: [{blocks: [{linear: {rtn: 4}}]}]", "expected settings such as {bits: 4}"),
    "a rule that is a word": ("stages: [{blocks: [{linear: gptq}]}]", "expected a rule such as"),
    "stages that are a mapping": ("stages: {blocks: []}", "stages"),
    "stages that are a number": ("stages: 3", "a recipe needs stages"),
    "stages that are a word": ("stages: blocks", "stages"),
    "a setting that is a list": ("stages: [{blocks: [{linear: {rtn: {bits: [4]}}}]}]", "rtn.bits"),
    "a stage that is a word": ("stages: [blocks]", "must have exactly one key"),
    "a fraction of a bit": ("stages: [{blocks: [{linear: {rtn: {bits: 4.5}}}]}]", "rtn.bits"),
    "a number for a switch": ("stages: [{blocks: [{linear: {rtn: {symmetric: maybe}}}]}]", "rtn.symmetric"),
    "too sparse": ("stages: [{blocks: [{linear: {wanda: {sparsity: 1}}}]}]", "sparsity must be more than 0"),
    "data that is a word": ("data: wiki\nstages: [{blocks: [{linear: {rtn: {}}}]}]", "expected settings"),
    "a percentage for a share": (
        "stages: [{blocks: [{linear: {match: embed, min_share: 10, rtn: {}}}]}]",
        "linear[0].min_share must be a fraction from 0 to 1, such as 0.1, not 10",
    ),
    "a negative share": ("stages: [{blocks: [{linear: {min_share: -3, rtn: {}}}]}]", "min_share must be a fraction"),
    "a switch for a share": ("stages: [{blocks: [{linear: {min_share: true, rtn: {}}}]}]", "linear[0].min_share"),
    "a text for leave": (
        "stages: [{blocks: [{linear: [{match: mlp.down, leave: 'false'}, {rtn: {}}]}]}]",
        "linear[0].leave: Input should be a valid boolean",
    ),
    "an empty match": ("stages: [{blocks: [{linear: {match: [], rtn: {}}}]}]", "linear[0].match is an empty list"),
    "a switch for a group size": ("stages: [{blocks: [{linear: {rtn: {group_size: true}}}]}]", "rtn.group_size"),
    "a switch for bits": ("stages: [{blocks: [{linear: {rtn: {bits: true}}}]}]", "rtn.bits: Input should be a valid"),
    "a switch for groups": ("stages: [{blocks: [{linear: {gptq: {guided: true}}}]}]", "gptq.guided"),
    "a switch for sequences": (
        "data: {num_sequences: true}\nstages: [{blocks: [{linear: {rtn: {}}}]}]",
        "data.num_sequences: expected a number or a text, not true",
    ),
    "a switch among widths": (
        "search: {bits: 3, widths: [true, 4]}\nstages: [{blocks: [{linear: {rtn: {}}}]}]",
        "search.widths: expected a number",
    ),
    "two lists of stages": (
        "stages: [{blocks: [{linear: {rtn: {}}}]}]\nstages: [{blocks: [{linear: {gptq: {}}}]}]",
        "mine.yaml line 2: the key 'stages' stands twice; keep one of them",
    ),
    "a field that stands twice": (
        "stages:\n  - blocks:\n    - linear: {rtn: {bits: 4, bits: 8}}", "line 3: the key 'bits' stands twice",
    ),
    "an unknown export": ("export: ggufs\nstages: [{blocks: [{linear: {rtn: {}}}]}]", "ggufs"),
}  # fmt: skip


@pytest.mark.parametrize("what", RECIPES)
def test_wrong_recipes_exit_2(what: str, base: Path, tmp_path: Path) -> None:
    text, message = RECIPES[what]
    (tmp_path / "mine.yaml").write_text(text)
    result = invoke("plan", base, tmp_path / "mine.yaml")
    assert result.exit_code == 2, (result.exception, result.stderr)
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


NO_GROUPS = {
    ("--set", "data.num_sequences=4"): "data: expected settings, not 'c4.txt'",
    ("--data", "wiki.txt"): "data: expected settings, not 'c4.txt'",
    ("--memory", "2GiB"): "budget: expected settings, not 'much'",
    ("--set", "gptq.bits=4"): "gptq: expected settings, not 4",
}


@pytest.mark.parametrize("changed", NO_GROUPS, ids=str)
def test_settings_of_what_is_no_group_exit_2(changed: tuple[str, str], base: Path, tmp_path: Path) -> None:
    text = "data: c4.txt\nbudget: much\nstages: [{blocks: [{linear: {gptq: 4}}]}]"
    (tmp_path / "mine.yaml").write_text(text)
    result = invoke("plan", base, tmp_path / "mine.yaml", *changed)
    assert result.exit_code == 2, (result.exception, result.stderr)
    assert NO_GROUPS[changed] in result.stderr
    assert result.stderr.count("\n") == 1


def test_an_alias_is_no_key_that_stands_twice(base: Path, tmp_path: Path) -> None:
    text = "stages: [{blocks: [{linear: [{match: mlp.down, rtn: &r {bits: 8, group_size: 8}}, {rtn: *r}]}]}]"
    (tmp_path / "mine.yaml").write_text(text)
    assert invoke("plan", base, tmp_path / "mine.yaml").exit_code == 0


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"- \x00", b"a: &x [*x]"])
def test_recipe_files_that_are_none_exit_2(content: bytes, base: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes(content)
    result = invoke("plan", base, tmp_path / "mine.yaml")
    assert result.exit_code == 2, (result.exception, result.stderr)
    assert result.stderr.count("\n") == 1
    (tmp_path / "folder.yaml").mkdir()
    assert invoke("plan", base, tmp_path / "folder.yaml").exit_code in (1, 2)

"""A recipe's export that its result would not fit is refused while planning, and no other."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

import decoct
from decoct.engine.compress import compress_job
from decoct.engine.job import Watch
from decoct.exporters import FORMATS, MisfitError, check_expected, export_model, report_path
from decoct.model import Model, open_model
from tests.cli.test_commands import invoke
from tests.engine.running import Settings, make_base, make_job, run

WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "num_hidden_layers": 1}
RTN: Settings = {"linear": {"rtn": {"bits": 4, "group_size": 16}}}


def blocks(*steps: Settings) -> list[Settings]:
    return [{"blocks": list(steps)}]


RECIPES: dict[str, list[Settings]] = {
    "groups": blocks(RTN),
    "channels": blocks({"linear": {"rtn": {"group_size": "channel"}}}),
    "a tensor": blocks({"linear": {"rtn": {"group_size": "tensor"}}}),
    "as wide as the model": blocks({"linear": {"match": "attn.*", "rtn": {"group_size": 64}}}),
    "as wide as the model, FP8": blocks({"linear": {"match": ["attn.*"], "mxfp": {"format": "fp8", "group_size": 64}}}),
    "FP8 in blocks": blocks({"linear": {"mxfp": {"format": "fp8", "group_size": 16}}}),
    "integer zero points": blocks({"linear": {"hqq": {"zero": "integer"}}}),
    "an embedding": blocks({"linear": {"match": "embed", "rtn": {"group_size": 16}}}),
    "some of q, k, v": blocks({"linear": {"match": "attn.q", "rtn": {"group_size": 16}}}),
    "pruned": blocks({"linear": {"wanda": {}}}),
    "pruned integers": blocks({"linear": {"wanda": {}}}, RTN),
    "factors": blocks({"linear": {"svd_llm": {"keep": 0.5}}}),
    "a correction": blocks(RTN, {"linear": {"eora": {"rank": 2}}}),
    "real zero points": blocks({"linear": {"hqq": {"group_size": 16}}}),
    "a codebook": blocks({"linear": {"qtip": {"bits": 2, "state_bits": 4}}}),
    "inputs by groups": blocks(RTN, {"linear": {"inputs": {"group_size": 16}}}),
    "inputs of tokens, clipped": blocks(RTN, {"linear": {"inputs": {"clip_ratio": 0.9}}}),
    "inputs of MX weights": blocks({"linear": {"mxfp": {"format": "mxfp4"}}}, {"linear": {"inputs": {}}}),
    "scales folded first": blocks({"smoothquant": {}}, RTN),
    "learned codes": blocks(RTN, {"autoround": {"num_steps": 1}}),
    "learned groups": blocks({"block_ap": {"bits": 4, "group_size": 16, "num_steps": 1}}),
    "rotated, all of it in the weights": blocks({"quarot": {"online": False}}, RTN),
    "rotated": blocks({"quarot": {}}, RTN),
    "rotated and nothing else": blocks({"quarot": {}}),
    "rotated, then rounded in a later pass": [*blocks({"quarot": {"online": False}}), *blocks(RTN)],
    "tuned": [*blocks(RTN), {"e2e_qp": {"num_steps": 1}}],
    "a cache": [
        *blocks({"linear": {"rtn": {"group_size": 32}}}),
        {"cache": {"kivi": {"group_size": 16, "window": 16}}},
    ],
    "a cache alone": [{"cache": {"kivi": {"group_size": 16, "window": 16}}}],
    "nothing": blocks({"linear": {"match": "*", "leave": True}}),
}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("estimate", "plan_tuning"):
        monkeypatch.setattr(f"decoct.engine.{module}.product_rate", lambda _: 1e11)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("planned"), "llama-tied", **WIDE)


def what_is_refused(model: Model, form: str, out: Path) -> str | None:
    try:
        export_model(model, form, out, load=False)
    except MisfitError as error:
        return error.what
    return None


def without_bytes(description: Any) -> Any:
    """A description but for the sizes of streams of bits, which depend on the numbers."""
    if isinstance(description, dict):
        streams = isinstance(description.get("tensor"), str) and not description["tensor"].startswith(("float", "bf"))
        return "…" if streams else {key: without_bytes(value) for key, value in description.items()}
    return [without_bytes(value) for value in description] if isinstance(description, list) else description


VARYING = {"Sparse", "LowRank"}
"""Kinds whose sizes follow from the numbers, or from a fraction of a shape rounded to a whole."""


@pytest.mark.parametrize("what", RECIPES)
def test_what_is_expected_is_made(what: str, base: Path, tmp_path: Path) -> None:
    """The result is described as planned; so the same exports are refused, for the same matrix and reason."""
    seen: list[Model] = []
    job = make_job(base, tmp_path / "out", stages=RECIPES[what])
    made = open_model(compress_job(replace(job, accept=seen.append), Watch()).folder)
    (expected,) = seen
    assert expected.described.keys() == made.described.keys()
    for name, description in made.described.items():
        if not {node.kind for node in made.weight(name).walk()} & VARYING:
            assert without_bytes(expected.described[name]) == without_bytes(description)
    assert (expected.tied, expected.cache) == (made.tied, made.cache)
    for form in FORMATS:
        refused = what_is_refused(made, form, tmp_path / form)
        if refused is None:
            check_expected(expected, form)
        else:
            label = refused.replace(made.source.label, expected.source.label)
            with pytest.raises(ValueError, match=r"or take .* out of the recipe's export") as caught:
                check_expected(expected, form)
            assert str(caught.value).startswith(f"export {form}: {label}; ")


REFUSED: dict[str, tuple[list[Settings], str, str]] = {
    "a kind": (RECIPES["factors"], "compressed_tensors", "q_proj.weight: it is a LowRank weight; quantize to integers"),
    "zero points": (RECIPES["real zero points"], "compressed_tensors", "quantize with zero: integer, or take"),
    "blocks": (RECIPES["FP8 in blocks"], "compressed_tensors", "for blocks of 16; leave mxfp's group_size out, or"),
    "inputs": (RECIPES["inputs by groups"], "compressed_tensors", "group_size: token or tensor, or take"),
    "inputs, dense": (
        RECIPES["inputs by groups"],
        "dense",
        "that the inputs of model.layers.0.self_attn.q_proj",
    ),
    "a cache": (RECIPES["a cache"], "dense", "keys and values are kept by kivi; leave the cache stage out, or take"),
    "an embedding": (RECIPES["an embedding"], "compressed_tensors", "embed, which its readers do not all load; leave"),
    "some of q, k, v": (RECIPES["some of q, k, v"], "compressed_tensors", "block 0: attn.q, attn.k, attn.v have"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_it_is_refused_before_any_work(what: str, base: Path, tmp_path: Path) -> None:
    stages, form, said = REFUSED[what]
    data = {"source": str(base.parent / "text.txt"), "num_sequences": 4, "sequence_length": 16}
    recipe = {"data": data, "stages": stages, "export": form}
    with pytest.raises(ValueError, match="export ") as planned:
        decoct.plan(base, recipe)
    with pytest.raises(ValueError, match="export ") as caught:
        decoct.compress(base, recipe, tmp_path / "out")
    assert str(planned.value) == str(caught.value)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_on_the_command_line(base: Path, tmp_path: Path) -> None:
    recipe = {"stages": blocks(RTN, {"linear": {"match": "embed", "rtn": {"group_size": 16}}})}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**recipe, "export": "compressed_tensors"}))
    for command in (["plan"], ["compress", "-o", tmp_path / "out"]):
        result = invoke(*command, base, tmp_path / "mine.yaml")
        assert result.exit_code == 1
        assert result.stderr.startswith("error: export compressed_tensors: compressed-tensors cannot hold model.embed")
        assert result.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.yaml"]


def test_a_policy_is_left_out_where_that_is_asked_for(base: Path, tmp_path: Path) -> None:
    out = run(base, tmp_path / "out", stages=RECIPES["a cache"]).folder
    for form in (each for each in FORMATS if each != "peft"):  # an adapter needs terms, which this has not
        with pytest.raises(ValueError, match="keys and values are kept by kivi; add --fold"):
            decoct.export(out, form, tmp_path / form)
        decoct.export(out, form, tmp_path / form, fold=True)
        assert report_path(tmp_path / form).exists()


def test_what_an_earlier_run_made_is_looked_at_too(base: Path, tmp_path: Path) -> None:
    """Left as it is, it is known; compressed further, it shows only in the run, and the result is there then."""
    first = run(base, tmp_path / "first", {"linear": {"match": "embed", "rtn": {"group_size": 16}}}).folder
    recipe = {"stages": blocks(RTN), "export": "compressed_tensors"}
    with pytest.raises(ValueError, match=r"export .* cannot hold model\.embed_tokens\.weight"):
        decoct.compress(first, recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    second = run(base, tmp_path / "second", RTN).folder
    recipe = {"stages": blocks({"linear": {"inputs": {"group_size": 16}}}), "export": "compressed_tensors"}
    with pytest.raises(ValueError, match=r"is finished, but not its export: .*q_proj"):
        decoct.compress(second, recipe, tmp_path / "rounded")
    recipe = {"stages": blocks({"linear": {"inputs": {}}}), "export": "compressed_tensors"}
    said: list[str] = []
    out = decoct.compress(second, recipe, tmp_path / "whole", watch=Watch(message=said.append)).folder
    assert (out / "compressed_tensors" / "config.json").exists()
    assert said[-1].startswith(f"exported {out / 'compressed_tensors'} (compressed_tensors): ")
    assert "checks passed" in said[-1]

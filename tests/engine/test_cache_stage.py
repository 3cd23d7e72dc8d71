"""A policy for keys and values is a stage: planned, saved with the model, resumed, measured with, and refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

import decoct
import decoct.hf  # registers the format
from decoct.engine import cache, copy
from decoct.engine.data import text_tokens
from decoct.engine.stages import RecipePlan, plan_stages
from decoct.evaluation import evaluate_model
from decoct.methods.cache.kivi import KIVI
from decoct.methods.policy import describe_policy, read_policy
from decoct.model import open_model
from decoct.recipe import RecipeError, parse_recipe
from decoct.store import read_json, write_json
from tests.engine.running import GPTQ, RTN, Crash, Settings, digests, make_base, make_job, run
from tests.engine.test_plan import untouched
from tests.engine.test_resume import stop_after

POLICY: Settings = {"kivi": {"bits": 4, "group_size": 8, "window": 16}}
STAGE: Settings = {"cache": POLICY}
METHOD = KIVI(bits=4, group_size=8, window=16)


def planned(base: Path, stages: list[Settings], **changes: Any) -> RecipePlan:
    job = make_job(base, Path(), stages=stages, **changes)
    return plan_stages(job.model, job.stages, job.data, job.budget, None)


def test_alone_it_keeps_every_weight(base: Path, tmp_path: Path) -> None:
    out = run(base, tmp_path / "out", stages=[STAGE]).folder
    before, after = open_model(base), open_model(out)
    policy = read_policy(after)
    assert policy is not None
    assert policy.method == METHOD
    assert after.described == {}
    assert after.nbytes == before.nbytes == planned(base, [STAGE]).output_bytes
    for name in before.slots():
        assert torch.equal(after.weight(name).unpack(), before.weight(name).unpack())
    assert "quantization_config" not in read_json(out / "config.json")
    assert after.lineage[-1]["stage"] == {"cache": {"kivi": {**POLICY["kivi"], "key_bits": None, "value_bits": None}}}
    assert decoct.inspect(out).cache == after.lineage[-1]["stage"]["cache"]
    assert decoct.inspect(base).cache is None


def test_after_a_pass_it_keeps_what_that_made(base: Path, tmp_path: Path) -> None:
    compressed = run(base, tmp_path / "one", RTN).folder
    out = run(base, tmp_path / "two", stages=[{"blocks": [RTN]}, STAGE]).folder
    one, two = open_model(compressed), open_model(out)
    assert one.described == two.described
    assert one.nbytes == two.nbytes
    for name in one.slots():
        assert torch.equal(one.weight(name).unpack(), two.weight(name).unpack())
    assert [list(entry["stage"]) for entry in two.lineage] == [["blocks"], ["cache"]]


def test_compressing_further_keeps_the_policy(base: Path, tmp_path: Path) -> None:
    first = run(base, tmp_path / "first", stages=[STAGE]).folder
    second = open_model(run(first, tmp_path / "second", RTN).folder)
    assert second.cache == open_model(first).cache
    assert second.described


def test_it_is_replaced_by_another(base: Path, tmp_path: Path) -> None:
    first = run(base, tmp_path / "first", stages=[STAGE]).folder
    second = run(first, tmp_path / "second", stages=[{"cache": {"kivi": {"bits": 2, "group_size": 8}}}]).folder
    policy = read_policy(open_model(second))
    assert policy is not None
    assert policy.method == KIVI(bits=2, group_size=8)


@pytest.mark.parametrize("part", range(5))
def test_resumed_it_gives_the_same_bits(part: int, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = digests(run(base, tmp_path / "whole", stages=[STAGE]).folder)
    with pytest.raises(Crash):
        run(base, tmp_path / "out", stages=[STAGE], watch=stop_after(part))
    written = []
    original = copy.write_shard

    def spy(path: Path, *arguments: Any) -> int:
        written.append(path.name)
        return original(path, *arguments)

    monkeypatch.setattr(copy, "write_shard", spy)
    assert digests(run(base, tmp_path / "out", stages=[STAGE]).folder) == expected
    assert len(written) == 5 - (part + 1)


def test_the_measurement_says_it(base: Path, tmp_path: Path) -> None:
    out = run(base, tmp_path / "out", stages=[STAGE]).folder
    text = str(base.parent / "text.txt")
    plain = evaluate_model(open_model(base), text=text, windows=3, length=64)
    found = evaluate_model(open_model(out), text=text, against=open_model(base), windows=3, length=64)
    assert (plain.cache, plain.cache_bits, plain.cache_token_bytes) == (None, None, None)
    assert "keys and values" not in plain.protocol
    assert found.cache == open_model(out).cache["policy"]  # type: ignore[index]
    assert "as in decoding token by token with kivi (bits 4, group_size 8, window 16)" in found.protocol
    assert found.cache_bits == 4 + 2 * 16 / 8
    values = 3 * 2 * 2 * 8  # blocks, keys and values, heads, channels
    assert found.cache_token_bytes == values * (48 * 1 + 16 * 4) / 64
    assert found.base_perplexity == plain.perplexity
    assert found.kl_mean is not None
    assert 1e-6 < found.kl_mean < 0.1
    coarse = run(base, tmp_path / "coarse", stages=[{"cache": {"kivi": {**POLICY["kivi"], "bits": 2}}}]).folder
    worse = evaluate_model(open_model(coarse), text=text, against=open_model(base), windows=3, length=64)
    assert worse.kl_mean is not None
    assert worse.kl_mean > 4 * found.kl_mean


def test_the_window_matters_and_windows_are_apart(base: Path, tmp_path: Path) -> None:
    """Nothing is lost where everything is in the window; and one text window does not see another's cache."""
    text = str(base.parent / "text.txt")
    out = run(base, tmp_path / "out", stages=[{"cache": {"kivi": {"bits": 2, "group_size": 8, "window": 64}}}]).folder
    found = evaluate_model(open_model(out), text=text, against=open_model(base), windows=3, length=64)
    assert found.kl_mean == 0
    assert found.cache_bits is None
    rough = run(base, tmp_path / "rough", stages=[STAGE]).folder
    several = evaluate_model(open_model(rough), text=text, windows=4, length=32)
    assert (
        several.cache_token_bytes
        == evaluate_model(open_model(rough), text=text, windows=1, length=32).cache_token_bytes
    )


FP8: list[Settings] = [{"blocks": [RTN]}, {"cache": {"fp8_cache": {}}}]


def test_what_was_learned_is_saved_bit_for_bit(base: Path, tmp_path: Path) -> None:
    """Scales are the largest keys and values that the compressed model makes of the calibration text."""
    assert planned(base, FP8).needs_data
    model = open_model(run(base, tmp_path / "out", stages=FP8).folder)
    policy = read_policy(model)
    assert policy is not None
    assert describe_policy(policy.method, policy.learned) == model.cache
    assert model.lineage[-1]["data"]["num_sequences"] == 4
    seen: dict[int, list[torch.Tensor]] = {}

    class Spy(DynamicCache):  # type: ignore[misc]
        def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
            seen[layer_idx] = [keys.abs().amax((0, 2, 3)), values.abs().amax((0, 2, 3))]
            return super().update(keys, values, layer_idx)

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    tokens = text_tokens(str(base.parent / "text.txt"), model)[: 4 * 16].reshape(4, 16)
    with torch.no_grad():
        loaded(tokens, past_key_values=Spy())
    for block, learned in enumerate(policy.learned):
        for name, largest in zip(("key_scale", "value_scale"), seen[block], strict=True):
            torch.testing.assert_close(learned[name], largest / 448, rtol=1e-4, atol=0)


@pytest.mark.parametrize("part", [0, 3])
def test_what_was_learned_is_not_learned_again(
    part: int, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = FP8[1:]
    expected = digests(run(base, tmp_path / "whole", stages=stages).folder)
    with pytest.raises(Crash):
        run(base, tmp_path / "out", stages=stages, watch=stop_after(part))

    def learn(*_: Any) -> None:
        raise AssertionError("the calibration ran again")

    monkeypatch.setattr(cache, "_forwards", learn)
    assert digests(run(base, tmp_path / "out", stages=stages).folder) == expected


REFUSED: dict[str, tuple[list[Settings], str]] = {
    "a group that does not divide the heads": (
        [{"cache": {"kivi": {"group_size": 32}}}],
        r"group_size 32 does not divide heads of 8 channels; use 8",
    ),
    "a stage after it": ([STAGE, {"blocks": [RTN]}], "cache must be the recipe's last stage"),
    "two of them": ([STAGE, STAGE], "cache must be the recipe's last stage"),
}  # fmt: skip


@pytest.mark.parametrize("why", REFUSED)
def test_refusals_while_planning(why: str, base: Path, tmp_path: Path) -> None:
    stages, message = REFUSED[why]
    before = untouched(tmp_path)
    with pytest.raises(ValueError, match=message):
        run(base, tmp_path / "out", stages=stages)
    assert untouched(tmp_path) == before


WRONG: dict[str, tuple[Settings, str]] = {
    "no policy": ({"cache": {"gptq": {}}}, "'gptq' is no policy for keys and values"),
    "a misspelt one": ({"cache": {"kivy": {}}}, "did you mean 'kivi'"),
    "several": ({"cache": {"kivi": {}, "gptq": {}}}, "exactly one key"),
    "bits": ({"cache": {"kivi": {"bits": 1}}}, "key_bits must be 2 to 8, not 1"),
    "value bits": ({"cache": {"kivi": {"value_bits": 16}}}, "value_bits must be 2 to 8, not 16"),
    "a group that fills no bytes": ({"cache": {"kivi": {"group_size": 12}}}, "a multiple of 8, not 12"),
    "a window": ({"cache": {"kivi": {"window": -1}}}, "window must not be negative"),
    "a wrong key": ({"cache": {"kivi": {"windw": 1}}}, "did you mean 'window'"),
    "as a stage": ({"kivi": {}}, r"write \{cache: \{kivi: …\}\}"),
    "as a step": ({"blocks": [{"kivi": {}}]}, r"write the stage \{cache: \{kivi: …\}\}"),
    "as a rule": ({"blocks": [{"linear": {"kivi": {}}}]}, r"write the stage \{cache: \{kivi: …\}\}"),
}


@pytest.mark.parametrize("why", WRONG)
def test_recipes_that_are_wrong(why: str) -> None:
    stage, message = WRONG[why]
    with pytest.raises(RecipeError, match=message):
        parse_recipe({"stages": [stage]})


def test_a_later_or_damaged_policy_is_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path)
    out = run(base, tmp_path / "out", stages=[STAGE]).folder
    manifest = read_json(out / "decoct.json")
    for change, message in (
        ({"format_version": 3}, r"policy has format 3, this decoct reads 2; install a newer decoct"),
        ({"policy": {"kivi": {"bits": 99}}}, r"damaged key-value cache policy in decoct\.json"),
        ({"policy": {"nothing": {}}}, r"damaged key-value cache policy in decoct\.json"),
        ({"learned": [{}]}, "is for another model"),
    ):
        write_json(out / "decoct.json", {**manifest, "cache": {**manifest["cache"], **change}})
        with pytest.raises(ValueError, match=message):
            decoct.inspect(out)
    del manifest["cache"]
    write_json(out / "decoct.json", manifest)
    assert open_model(out).cache is None


def test_a_model_from_before_policies_stays_readable(base: Path, tmp_path: Path) -> None:
    out = run(base, tmp_path / "out", GPTQ).folder
    assert "cache" not in json.loads((out / "decoct.json").read_text())
    assert open_model(out).cache is None

"""Blocks that keep different numbers of neurons: real bytes, zeros elsewhere, and the same model in every reader."""

from pathlib import Path
from typing import Any

import pytest
import torch

from decoct.engine import stream
from decoct.engine.compress import compress_job
from decoct.engine.job import Watch
from decoct.engine.stages import plan_stages
from decoct.model import Model, open_model
from decoct.weights import GroupInt, Padded
from tests.engine.running import Crash, crash_at, digests, make_base, make_job
from tests.engine.test_depth import stages
from tests.engine.test_rotate import predictions, some_tokens
from tests.engine.test_width import DATA, WIDTH_METHODS, narrow

NEURONS = 48


def stage(name: str = "flap", **settings: Any) -> dict[str, Any]:
    return {name: {"keep": 0.8, "multiple_of": 4, "uneven": True, **settings}}


def counts(made: Model) -> list[int]:
    """Neurons that each block has left; its three matrices agree."""
    found = []
    for block in range(made.num_blocks):
        here = {slot.role: made.weight(made.prefix(block) + slot.name) for slot in made.block_slots}
        mlp = [here[role] for role in ("mlp.gate", "mlp.up", "mlp.down")]
        assert all(isinstance(weight, Padded) for weight in mlp)
        gate, up, down = (weight.inner.shape for weight in mlp)  # type: ignore[attr-defined]
        assert gate[0] == up[0] == down[1]
        found.append(gate[0])
    return found


@pytest.mark.parametrize("name", WIDTH_METHODS)
@torch.no_grad()
def test_as_many_neurons_as_when_even(name: str, tmp_path: Path) -> None:
    base = make_base(tmp_path)
    job = make_job(base, tmp_path / "plan", **stages(stage(name, multiple_of=1)), data=DATA)
    plan = plan_stages(job.model, job.stages, job.data, job.budget, None)
    result = narrow(base, tmp_path / "out", stage(name, multiple_of=1))
    even = narrow(base, tmp_path / "even", {name: {"keep": 0.8, "multiple_of": 1}})
    made, found = open_model(result.folder), counts(open_model(result.folder))
    assert sum(found) == open_model(even.folder).config["intermediate_size"] * made.num_blocks
    assert len(set(found)) > 1
    assert all(0 < count <= NEURONS for count in found)
    assert result.nbytes == pytest.approx(even.nbytes, rel=0.02)
    assert result.nbytes == pytest.approx(plan.output_bytes, rel=0.02)
    assert torch.isfinite(predictions(made, some_tokens())).all()


@torch.no_grad()
def test_every_reader_sees_the_same_model(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    import decoct.hf

    made = narrow(make_base(tmp_path), tmp_path / "out", stage()).folder
    expected = predictions(open_model(made), some_tokens())
    found = AutoModelForCausalLM.from_pretrained(made)(some_tokens()).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    decoct.export(made, "dense", tmp_path / "dense")
    assert "quantization_config" not in open_model(tmp_path / "dense").config
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")(some_tokens()).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_quantized_afterwards_it_keeps_its_widths(tmp_path: Path) -> None:
    base = make_base(tmp_path)
    gptq = {"blocks": [{"linear": {"gptq": {"bits": 4, "group_size": 4}}}]}
    alone, both = (
        open_model(narrow(base, tmp_path / name, stage(), *more).folder) for name, more in (("a", []), ("b", [gptq]))
    )
    assert counts(alone) == counts(both)
    for name in alone.described:
        weight = both.weight(name)
        assert isinstance(weight, Padded)
        assert isinstance(weight.inner, GroupInt)
        corner = tuple(slice(0, size) for size in weight.inner.shape)
        rest = weight.unpack()
        rest[corner] = 0
        assert not rest.any()


@pytest.mark.parametrize("family", ["gpt2", "opt", "qwen2", "gemma2"])
@torch.no_grad()
def test_families(family: str, tmp_path: Path) -> None:
    made = narrow(make_base(tmp_path, family), tmp_path / "out", stage("magnitude_width"))
    assert torch.isfinite(predictions(open_model(made.folder), some_tokens())).all()


def test_it_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base(tmp_path)
    whole = digests(narrow(base, tmp_path / "whole", stage("llm_pruner")).folder)
    with monkeypatch.context() as patch:
        patch.setattr(stream, "write_shard", crash_at(2, stream.write_shard))
        with pytest.raises(Crash):
            narrow(base, tmp_path / "out", stage("llm_pruner"))
    assert digests(narrow(base, tmp_path / "out", stage("llm_pruner")).folder) == whole


LATER: dict[str, tuple[dict[str, Any], str]] = {
    "pruning": ({"linear": {"wanda": {}}}, "leave uneven out, or take a quantizer"),
    "groups that fit the whole matrix only": ({"linear": {"gptq": {"group_size": 8}}}, "does not divide"),
    "rotation": ({"quarot": {}}, "leave quarot or uneven out"),
    "rescaling": ({"smoothquant": {}}, "leave smoothquant or uneven out"),
}


@pytest.mark.parametrize("case", LATER)
def test_what_cannot_follow_is_refused_while_planning(case: str, tmp_path: Path) -> None:
    step, message = LATER[case]
    blocks = {"blocks": [step, *([] if "linear" in step else [{"linear": {"rtn": {"group_size": 4}}}])]}
    job = make_job(make_base(tmp_path), tmp_path / "out", **stages(stage(), blocks), data=DATA)
    with pytest.raises(ValueError, match=message):
        plan_stages(job.model, job.stages, job.data, job.budget, None)


@pytest.mark.parametrize("learner", ["autoround", "block_ap"])
def test_what_learns_codes_works_on_the_corner(learner: str, tmp_path: Path) -> None:
    gptq = {"linear": {"gptq": {"bits": 4, "group_size": 4}}}
    base = make_base(tmp_path)
    job = make_job(
        base, tmp_path / "out", **stages(stage(), {"blocks": [gptq, {learner: {"num_steps": 2}}]}), data=DATA
    )
    plan = plan_stages(job.model, job.stages, job.data, job.budget, None)
    assert [group.role for group in plan.stages[0].groups] == ["mlp.gate", "mlp.up", "mlp.down"]
    result = compress_job(job, Watch())
    assert result.nbytes == pytest.approx(plan.output_bytes, rel=0.02)


def test_refusals(tmp_path: Path) -> None:
    base = make_base(tmp_path, "phi3")
    job = make_job(base, tmp_path / "out", **stages(stage(bias=False)), data=DATA)
    with pytest.raises(ValueError, match="gate and up in one matrix; leave uneven out"):
        plan_stages(job.model, job.stages, job.data, job.budget, None)
    with pytest.raises(ValueError, match="uneven is for neurons alone"):
        make_job(base, tmp_path / "out", **stages(stage(keep_heads=0.5)))

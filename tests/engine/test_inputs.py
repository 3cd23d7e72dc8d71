"""Weights that round their inputs run as they are: streamed, resumed, measured, and in transformers."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import decoct.hf  # noqa: F401 - registers the format
from decoct.engine.job import Watch
from decoct.engine.runner import Runner
from decoct.engine.stages import plan_stages
from decoct.evaluation.measure import evaluate_model
from decoct.model import Model, open_model
from decoct.weights import Dense, QuantizedInput, Weight
from tests.engine.running import DATA, Crash, Settings, crash_at, digests, make_base, make_job, run

W8: Settings = {"linear": {"rtn": {"bits": 8, "group_size": "channel"}}}
A8: Settings = {"linear": {"inputs": {"bits": 8}}}
A2: Settings = {"linear": {"inputs": {"bits": 2}}}
EORA: Settings = {"linear": {"eora": {"rank": 2}}}
RECIPES: dict[str, tuple[list[Settings], set[str]]] = {
    "w8a8": ([W8, A8], {"QuantizedInput", "GroupInt"}),
    "smoothquant": ([{"smoothquant": {}}, W8, A8], {"QuantizedInput", "GroupInt"}),
    "w4a8": (
        [{"linear": {"rtn": {"bits": 4, "group_size": 8}}}, {"linear": {"inputs": {"symmetric": False}}}],
        {"QuantizedInput", "GroupInt"},
    ),
    "static": ([W8, {"linear": {"inputs": {"group_size": "tensor"}}}], {"QuantizedInput", "GroupInt"}),
    "fp8": (
        [{"linear": {"mxfp": {"format": "fp8"}}}, {"linear": {"inputs": {"format": "fp8"}}}],
        {"QuantizedInput", "FloatBlock"},
    ),
    "nvfp4": (
        [{"linear": {"mxfp": {"format": "nvfp4"}}}, {"linear": {"inputs": {"format": "nvfp4"}}}],
        {"QuantizedInput", "FloatBlock"},
    ),
    "llm_int8": (
        [{"linear": {"llm_int8": {"threshold": 0.5, "keep": 0.1}}}], {"Sum", "Columns", "QuantizedInput", "GroupInt"},
    ),
    "eora": ([W8, A8, EORA], {"Sum", "LowRank", "Dense", "QuantizedInput", "GroupInt"}),
    "after eora": ([W8, EORA, A8], {"Sum", "LowRank", "Dense", "QuantizedInput", "GroupInt"}),
    "low rank": (
        [{"linear": {"svd_llm": {"keep": 0.8}}}, W8, A8], {"LowRank", "QuantizedInput", "GroupInt"}
    ),
    "rotated": ([{"linear": {"qtip": {"bits": 4}}}, A8], {"Rotated", "QuantizedInput", "Trellis"}),
    "inputs alone": ([A8], {"QuantizedInput", "Dense"}),
}  # fmt: skip


def tokens() -> torch.Tensor:
    return torch.randint(3, 60, (2, 24), generator=torch.Generator().manual_seed(1))


def our_logits(model: Model, plain: bool = False) -> torch.Tensor:
    """In float32; `plain`: by the matrices alone, as if inputs were not rounded."""
    runner = Runner(model, torch.float32)
    hidden = runner.embed(tokens(), model.weight(model.family.embed).unpack(torch.float32))
    for block in range(model.num_blocks):
        weights: dict[str, Weight] = {
            name: model.weight(name) for name in (model.prefix(block) + slot.name for slot in model.block_slots)
        }
        if plain:
            weights = {name: Dense.of(weight.unpack(torch.float32)) for name, weight in weights.items()}
        hidden = runner.run(block, runner.lay_out(block, weights), hidden)
    head = model.weight(model.family.embed if model.tied else model.family.head)
    return runner.logits(hidden, head.unpack(torch.float32))


@pytest.mark.parametrize("recipe", RECIPES)
@torch.no_grad()
def test_it_is_planned_repeated_and_computes_the_same_in_transformers(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Rounding inputs makes another code of another last bit, so both sides attend by torch.
    monkeypatch.setattr("decoct.native.attention._FASTER", ())
    steps, kinds = RECIPES[recipe]
    base = make_base(tmp_path, intermediate_size=64)
    job = make_job(base, tmp_path / "out", *steps)
    (plan,) = plan_stages(job.model, job.stages, job.data, job.budget, job.out).stages
    out = run(base, tmp_path / "out", *steps).folder
    assert digests(run(base, tmp_path / "again", *steps).folder) == digests(out)
    model = open_model(out)
    assert plan.output_bytes == pytest.approx(model.nbytes, rel=0.12)
    weights = [model.weight(name) for name in model.described]
    assert len(weights) == 3 * 7
    assert {node.kind for weight in weights for node in weight.walk()} == kinds
    assert all(weight.quantizes_inputs for weight in weights)
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    ours = our_logits(model)
    torch.testing.assert_close(loaded(tokens()).logits, ours, rtol=1e-3, atol=1e-3)
    assert float((our_logits(model, plain=True) - ours).abs().max()) > 1e-3


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "gemma2", "phi3", "opt"])
@torch.no_grad()
def test_biases_and_transposed_matrices(family: str, tmp_path: Path) -> None:
    base = make_base(tmp_path, family)
    out = run(base, tmp_path / "out", W8, A8).folder
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    torch.testing.assert_close(loaded(tokens()).logits, our_logits(open_model(out)), rtol=1e-3, atol=1e-3)


def errors(folder: Path, base: Path, *steps: Settings) -> list[float]:
    found: list[float | None] = []
    run(base, folder, *steps, watch=Watch(event=lambda event: found.append(event.error)))
    return [error for error in found if error]


def test_the_streamed_error_sees_rounded_inputs(tmp_path: Path) -> None:
    """The matrices are the same; a step that needs statistics makes the block run, so its error is one of outputs."""
    base = make_base(tmp_path)
    gptq: Settings = {"linear": {"gptq": {"bits": 8, "group_size": "channel"}}}
    plain, fine, coarse = (
        errors(tmp_path / name, base, gptq, *steps) for name, steps in (("w", []), ("a8", [A8]), ("a2", [A2]))
    )
    assert len(plain) == len(fine) == len(coarse) == 3
    for block in range(3):
        assert plain[block] < fine[block] < 0.1 * coarse[block]


def test_the_next_block_is_calibrated_on_what_rounded_inputs_give(tmp_path: Path) -> None:
    base = make_base(tmp_path)
    steps: list[Settings] = [{"linear": {"gptq": {"bits": 4, "group_size": 8}}}]
    alone = open_model(run(base, tmp_path / "w", *steps).folder)
    rounded = open_model(run(base, tmp_path / "a", *steps, A2).folder)

    def codes(model: Model, block: int) -> torch.Tensor:
        weight = model.weight(f"{model.prefix(block)}mlp.down_proj.weight")
        return weight.inner.unpack() if isinstance(weight, QuantizedInput) else weight.unpack()

    assert torch.equal(codes(alone, 0), codes(rounded, 0))
    assert not torch.equal(codes(alone, 1), codes(rounded, 1))


def test_a_run_that_was_cut_off_gives_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from decoct.engine import stream

    base = make_base(tmp_path)
    steps: list[Settings] = [{"linear": {"gptq": {"bits": 4, "group_size": 8}}}, A8]
    whole = digests(run(base, tmp_path / "whole", *steps).folder)
    with monkeypatch.context() as patch:
        patch.setattr(stream, "write_shard", crash_at(2, stream.write_shard))
        with pytest.raises(Crash):
            run(base, tmp_path / "out", *steps)
    assert digests(run(base, tmp_path / "out", *steps).folder) == whole


def test_measuring_rounds_inputs_too(tmp_path: Path) -> None:
    base = make_base(tmp_path)
    text = str(base.parent / "text.txt")
    original = open_model(base)
    kl = []
    for name, steps in (("w8", [W8]), ("w8a8", [W8, A8]), ("w8a2", [W8, A2])):
        model = open_model(run(base, tmp_path / name, *steps).folder)
        found = evaluate_model(model, text=text, against=original, windows=4, length=16).kl_mean
        assert found is not None
        kl.append(found)
    assert kl[0] < kl[1] < 0.1 * kl[2]


def test_autoround_leaves_such_weights_alone_and_runs_them_as_they_are(tmp_path: Path) -> None:
    base = make_base(tmp_path)
    mixed: list[Settings] = [
        {"linear": {"rtn": {"bits": 3, "group_size": 8}}},
        {"linear": {"match": "mlp.down", "inputs": {"bits": 2}}},
    ]
    learn: Settings = {"autoround": {"num_steps": 32, "batch_size": 2}}
    before = open_model(run(base, tmp_path / "before", *mixed).folder)
    after = open_model(run(base, tmp_path / "after", *mixed, learn).folder)
    changed = {
        slot.role
        for slot in before.block_slots
        if not torch.equal(*(m.weight(m.prefix(0) + slot.name).unpack() for m in (before, after)))
    }
    assert "mlp.down" not in changed
    assert {"mlp.up", "attn.o"} <= changed


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([{"blocks": [W8, A8, {"autoround": {}}]}], "put the step that rounds inputs after it"),
        ([{"blocks": [W8, A8]}, {"e2e_qp": {}}], "put the step that rounds inputs into a blocks stage after it"),
        ([{"blocks": [W8, A8, A8]}], "its inputs are rounded already"),
        ([{"blocks": [W8, A8]}, {"blocks": [A8]}], "its inputs are rounded already"),
        ([{"blocks": [A8, {"linear": {"wanda": {}}}]}], "wanda cannot be applied to a QuantizedInput"),
        ([{"blocks": [{"linear": {"match": "lm_head", "inputs": {}}}]}], "lm_head reads its inputs as they are"),
        ([{"blocks": [{"linear": {"inputs": {"group_size": 5}}}]}], "group_size 5 does not divide 32 input features"),
        (
            [{"blocks": [{"linear": {"svd_llm": {}}}, {"linear": {"inputs": {"group_size": "tensor"}}}]}],
            "a LowRank weight rounds inputs that no scale was chosen on; use int or fp8 by token",
        ),
        ([{"blocks": [{"linear": {"svd_llm": {}}}, {"linear": {"llm_int8": {}}}]}], "llm_int8 cannot be applied to"),
    ],
)
def test_what_does_not_go_together_is_refused_while_planning(
    stages: list[Settings], message: str, tmp_path: Path
) -> None:
    base = make_base(tmp_path)
    job = make_job(base, tmp_path / "out", stages=stages)
    with pytest.raises(ValueError, match=message):
        plan_stages(job.model, job.stages, job.data, job.budget, job.out)


def test_inputs_may_follow_tuning_in_a_stage_of_their_own(tmp_path: Path) -> None:
    base = make_base(tmp_path)
    stages: list[Settings] = [{"blocks": [W8]}, {"e2e_qp": {"num_steps": 2}}, {"blocks": [A8]}]
    model = open_model(run(base, tmp_path / "out", stages=stages).folder)
    assert all(isinstance(model.weight(name), QuantizedInput) for name in model.described)


def test_experts_are_refused_while_planning(tmp_path: Path) -> None:
    base = make_base(tmp_path, "mixtral")
    job = make_job(base, tmp_path / "out", W8, A8)
    with pytest.raises(ValueError, match=r"fused experts read their inputs as they are; begin .*match: moe\.\*"):
        plan_stages(job.model, job.stages, job.data, job.budget, job.out)
    steps: Settings = {"linear": [{"match": "moe.*", "leave": True}, {"match": "*", "inputs": {}}]}
    out = run(base, tmp_path / "out", W8, steps).folder
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens()).logits, our_logits(open_model(out)), rtol=1e-3, atol=1e-3)


def test_data_are_read_only_where_a_scale_has_to_be_chosen(tmp_path: Path) -> None:
    base = make_base(tmp_path)
    assert DATA
    for step, needs in ((A8, False), ({"linear": {"inputs": {"group_size": "tensor"}}}, True)):
        job = make_job(base, tmp_path / "out", W8, step)
        (plan,) = plan_stages(job.model, job.stages, job.data, job.budget, job.out).stages
        assert plan.needs_data == needs

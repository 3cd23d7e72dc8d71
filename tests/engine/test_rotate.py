"""Rotations change every weight and nothing that the model predicts."""

from pathlib import Path
from typing import Any

import pytest
import torch

from decoct.engine.compress import compress_job
from decoct.engine.job import Watch
from decoct.engine.rotate import RotatedModel, rotated
from decoct.engine.runner import Runner
from decoct.engine.stages import plan_stages
from decoct.methods import METHODS
from decoct.model import Model, open_model
from decoct.weights import Rotated
from tests.engine.running import AUTOROUND, EORA, EVERYTHING, GPTQ, RTN, WANDA, digests, make_base, make_job, run
from tests.tiny import CONFIGS, save_model

QUAROT: dict[str, Any] = {"quarot": {}}
INSIDE: dict[str, Any] = {"quarot": {"online": False}}
FUSED = {"values": False}
STAYS = {"residual": False}
SETTINGS: dict[str, dict[str, bool]] = {
    "phi3": FUSED, "gpt2": FUSED, "gpt_neox": FUSED, "gemma2": STAYS, "gemma3_text": STAYS, "olmo2": STAYS,
}  # fmt: skip


def predictions(model: Model, tokens: torch.Tensor) -> torch.Tensor:
    """Logits, block by block."""
    runner = Runner(model, torch.float32)
    hidden = runner.embed(tokens, model.weight(model.family.embed).unpack(torch.float32))
    for number in range(model.num_blocks):
        weights = {
            model.prefix(number) + s.name: model.weight(model.prefix(number) + s.name) for s in model.block_slots
        }
        hidden = runner.run(number, runner.lay_out(number, weights), hidden)
    head = model.weight(model.family.embed if model.tied else model.family.head).unpack(torch.float32)
    return runner.logits(hidden, head)


def some_tokens() -> torch.Tensor:
    return torch.randint(3, 90, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_every_family_predicts_the_same(name: str, tmp_path: Path) -> None:
    reference = save_model(name, tmp_path)
    base = open_model(tmp_path)
    model = rotated(base, [METHODS["quarot"](**SETTINGS.get(name, {}))])
    assert isinstance(model, RotatedModel)
    tokens = some_tokens()
    torch.testing.assert_close(predictions(model, tokens), reference(tokens).logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["llama-tied", "qwen2", "gpt2", "mixtral"])
@torch.no_grad()
def test_a_saved_one_loads_in_transformers_and_predicts_the_same(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    import decoct.hf

    base = make_base(tmp_path, name)
    result = run(base, tmp_path / "out", {"quarot": SETTINGS.get(name, {})})
    tokens = some_tokens()
    assert decoct.hf
    wanted = AutoModelForCausalLM.from_pretrained(base)(tokens).logits
    found = AutoModelForCausalLM.from_pretrained(result.folder)(tokens).logits
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


def test_a_tied_embedding_is_untied_and_counted(tmp_path: Path) -> None:
    base = make_base(tmp_path, "llama-tied")
    job = make_job(base, tmp_path / "out", QUAROT)
    plan = plan_stages(job.model, job.stages, job.data, job.budget, None)
    result = compress_job(job, Watch())
    made = open_model(result.folder)
    assert made.config["tie_word_embeddings"] is False
    assert not made.tied
    signs = 2 * 48 * 3
    assert made.nbytes == job.model.nbytes + 96 * 32 * 4 + signs
    assert plan.output_bytes == made.nbytes
    assert plan.num_parameters == made.num_parameters == job.model.num_parameters + 96 * 32
    assert any(group.role == "lm_head" and group.methods for group in plan.stages[0].groups)


@pytest.mark.parametrize(
    "steps",
    [
        [QUAROT, RTN],
        [QUAROT, GPTQ],
        [QUAROT, GPTQ, EORA],
        [QUAROT, {"linear": {"hqq": {"bits": 4, "group_size": 8}}}],
        [INSIDE, WANDA, GPTQ],
        [INSIDE, {"awq": {"bits": 4, "group_size": 8}}, RTN],
        [{"quarot": {"online": ["attn.o", "mlp.down"], "residual": False}}, EVERYTHING],
    ],
)
def test_plans_know_the_size(steps: list[Any], tmp_path: Path) -> None:
    base = make_base(tmp_path, "llama-tied")
    job = make_job(base, tmp_path / "out", *steps)
    plan = plan_stages(job.model, job.stages, job.data, job.budget, None)
    assert plan.output_bytes == pytest.approx(run(base, tmp_path / "out", *steps).nbytes, rel=0.02)


def test_quantized_inputs_of_a_role_stay_inside_their_rotation(tmp_path: Path) -> None:
    result = run(make_base(tmp_path), tmp_path / "out", QUAROT, GPTQ)
    made = open_model(result.folder)
    down = made.weight("model.layers.1.mlp.down_proj.weight")
    assert isinstance(down, Rotated)
    assert [node.kind for node in down.walk()] == ["Rotated", "GroupInt"]
    assert down.left is None
    assert made.weight("model.layers.1.mlp.up_proj.weight").kind == "GroupInt"
    assert set(result.errors) == {"block 0", "block 1", "block 2"}


def test_feedback_sees_rotated_statistics(tmp_path: Path) -> None:
    """With the statistic of another basis GPTQ would be worse than plain rounding."""
    base = make_base(tmp_path)
    data = {"num_sequences": 16}
    rounded = run(
        base,
        tmp_path / "rtn",
        QUAROT,
        {"linear": {"match": "mlp.down", "rtn": {"bits": 3, "group_size": 8}}},
        data=data,
    )
    feedback = run(
        base,
        tmp_path / "gptq",
        QUAROT,
        {"linear": {"match": "mlp.down", "gptq": {"bits": 3, "group_size": 8}}},
        data=data,
    )
    assert sum(feedback.errors.values()) < 0.8 * sum(rounded.errors.values())


@pytest.mark.parametrize(
    "second", [AUTOROUND, {"linear": {"gptaq": {"bits": 4, "group_size": 8}}}, {"linear": {"svd_llm": {"keep": 0.6}}}]
)
def test_steps_that_compare_with_the_model_as_it_was(second: Any, tmp_path: Path) -> None:
    """Both chains of hidden states are in one basis; in two, errors would be of the size of the states."""
    base = make_base(tmp_path)
    steps = [INSIDE, RTN, second] if "autoround" in second else [INSIDE, second]
    turned, plain = run(base, tmp_path / "turned", *steps), run(base, tmp_path / "plain", *steps[1:])
    assert max(turned.errors.values()) < 3 * max(plain.errors.values())


def test_autoround_improves_a_matrix_whose_inputs_are_rotated(tmp_path: Path) -> None:
    base = make_base(tmp_path)
    only = {"linear": {"match": "mlp.down", "rtn": {"bits": 2, "group_size": 8}}}
    learn = {"autoround": {"num_steps": 20, "batch_size": 4}}
    before, after = run(base, tmp_path / "a", QUAROT, only), run(base, tmp_path / "b", QUAROT, only, learn)
    assert after.errors["block 0"] < 0.95 * before.errors["block 0"]


def test_tuning_imitates_the_model_in_its_first_basis(tmp_path: Path) -> None:
    base = make_base(tmp_path, "llama-tied")
    stages = [{"blocks": [QUAROT, RTN]}, {"e2e_qp": {"num_steps": 3, "batch_size": 2}}]
    losses: list[float] = []
    result = compress_job(
        make_job(base, tmp_path / "out", stages=stages),
        Watch(event=lambda event: losses.append(event.loss) if event.loss is not None else None),
    )
    assert losses[0] < 0.5
    assert losses[-1] < losses[0]
    assert not open_model(result.folder).tied


def test_a_rotation_may_have_a_stage_of_its_own(tmp_path: Path) -> None:
    base = make_base(tmp_path, "llama-tied")
    stages = [{"blocks": [QUAROT]}, {"blocks": [GPTQ]}]
    job = make_job(base, tmp_path / "out", stages=stages)
    plan = plan_stages(job.model, job.stages, job.data, job.budget, None)
    two, one = compress_job(job, Watch()), run(base, tmp_path / "one", QUAROT, GPTQ)
    weight = "model.layers.2.mlp.down_proj.weight"
    assert torch.equal(open_model(two.folder).weight(weight).unpack(), open_model(one.folder).weight(weight).unpack())
    assert plan.output_bytes == pytest.approx(two.nbytes, rel=0.02)


@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_a_run_that_was_stopped_goes_on_alike(name: str, tmp_path: Path) -> None:
    base = make_base(tmp_path, name)
    steps = [{"quarot": SETTINGS.get(name, {})}, GPTQ]
    whole = digests(run(base, tmp_path / "whole", *steps).folder)

    class StopError(Exception):
        pass

    def stop(event: Any) -> None:
        if event.part == "block 1":
            raise StopError

    with pytest.raises(StopError):
        compress_job(make_job(base, tmp_path / "again", *steps), Watch(event=stop))
    assert digests(run(base, tmp_path / "again", *steps).folder) == whole


def test_a_seed_changes_the_rotation(tmp_path: Path) -> None:
    base = open_model(make_base(tmp_path))
    name = "model.layers.0.mlp.up_proj.weight"
    one, other = (rotated(base, [METHODS["quarot"](seed=seed)]).weight(name).unpack() for seed in (0, 1))
    assert not torch.allclose(one, other, atol=0.05)
    assert not torch.allclose(one, base.weight(name).unpack(), atol=0.05)


@pytest.mark.parametrize(
    ("name", "steps", "message"),
    [
        ("gemma2", [QUAROT], "norms after each sublayer.*set residual: false"),
        ("olmo2", [QUAROT], "norms after each sublayer.*set residual: false"),
        ("phi3", [QUAROT], "no matrix for values alone.*set values: false"),
        ("llama", [GPTQ, QUAROT], "first of its blocks list"),
        ("llama", [QUAROT, QUAROT], "first of its blocks list"),
        ("llama", [QUAROT, WANDA], "down_proj.*cannot work on a matrix whose inputs are rotated.*online"),
        ("llama", [QUAROT, {"smoothquant": {}}], "down_proj.*rotated while the model runs.*set online: false"),
        ("llama", [{"quarot": {"online": ["mlp.gone"]}}], "no role 'mlp.gone'; its roles: attn.k"),
        ("llama", [{"quarot": {"residual": False, "values": False, "online": False}}], "all off"),
    ],
)
def test_what_cannot_be_done_is_refused_while_planning(
    name: str, steps: list[Any], message: str, tmp_path: Path
) -> None:
    base = make_base(tmp_path, name)
    with pytest.raises(ValueError, match=message):
        run(base, tmp_path / "out", *steps)


def test_what_is_compressed_already_is_not_rotated(tmp_path: Path) -> None:
    base = make_base(tmp_path)
    with pytest.raises(ValueError, match="only dense weights can be rotated"):
        run(base, tmp_path / "out", stages=[{"blocks": [RTN]}, {"blocks": [QUAROT]}])
    made = run(base, tmp_path / "rtn", RTN).folder
    with pytest.raises(ValueError, match="only dense weights can be rotated"):
        run(made, tmp_path / "again", QUAROT, data={"source": str(base.parent / "text.txt")})


def test_opt_with_norms_after_its_sublayers_or_a_projected_embedding(tmp_path: Path) -> None:
    for changes, message in (
        ({"do_layer_norm_before": False}, "norms after"),
        ({"word_embed_proj_dim": 16}, "projected"),
    ):
        save_model("opt", tmp_path / message, **changes)
        job = make_job(make_base(tmp_path / f"base-{message}"), tmp_path / "out", QUAROT)
        with pytest.raises(ValueError, match=message):
            plan_stages(open_model(tmp_path / message), job.stages, job.data, job.budget, None)


@torch.no_grad()
def test_a_real_model_predicts_the_same(stories: Path) -> None:
    base = open_model(stories)
    tokens = torch.randint(3, 500, (2, 64), generator=torch.Generator().manual_seed(1))
    turned = rotated(base, [METHODS["quarot"]()])
    torch.testing.assert_close(predictions(turned, tokens), predictions(base, tokens), rtol=1e-3, atol=1e-3)

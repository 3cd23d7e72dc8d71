"""Taking out neurons and heads: a plain smaller checkpoint, of exactly the rows and columns that were chosen."""

from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch

from decoct.engine.compress import compress_job
from decoct.engine.find_information import Informing, find_information
from decoct.engine.gradients import Sweep
from decoct.engine.job import Watch
from decoct.engine.narrow import NarrowModel, channels_of, head_trunk, mlp_trunk
from decoct.engine.stages import plan_stages
from decoct.engine.stream import _Streamer
from decoct.methods import METHODS
from decoct.methods.prune.magnitude_width import MagnitudeWidth
from decoct.model import open_model
from decoct.recipe import RecipeError, parse_recipe
from decoct.weights import Dense
from tests.engine.running import GPTQ, Crash, crash_at, digests, make_base, make_job
from tests.engine.test_depth import stages
from tests.engine.test_rotate import predictions, some_tokens

WIDTH_METHODS = ["magnitude_width", "minitron", "flap", "llm_pruner", "ziplm"]
NARROWABLE = [
    "llama",
    "llama-tied",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi3",
    "olmo2",
    "gpt2",
    "opt",
]
DATA = {"num_sequences": 8, "sequence_length": 32}


def stage(name: str = "ziplm", **settings: Any) -> dict[str, Any]:
    return {name: {"keep": 0.8, "multiple_of": 4, **settings}}


def narrow(base: Path, out: Path, *given: dict[str, Any]) -> Any:
    return compress_job(make_job(base, out, **stages(*given), data=DATA), Watch())


@pytest.mark.parametrize("name", WIDTH_METHODS)
@torch.no_grad()
def test_stock_transformers_loads_what_is_left(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base = make_base(tmp_path)
    job = make_job(base, tmp_path / "out", **stages(stage(name, keep_heads=0.5)), data=DATA)
    plan = plan_stages(job.model, job.stages, job.data, job.budget, None)
    result = compress_job(job, Watch())
    made = open_model(result.folder)
    assert "quantization_config" not in made.config
    assert made.config["num_attention_heads"] == 2
    assert made.config["intermediate_size"] < 48
    assert made.num_parameters <= 0.8 * job.model.num_parameters * (1.02 if name == "flap" else 1)
    assert result.nbytes == pytest.approx(plan.output_bytes, rel=0.02)
    found = AutoModelForCausalLM.from_pretrained(result.folder)(some_tokens()).logits
    torch.testing.assert_close(found, predictions(made, some_tokens()), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", NARROWABLE)
@torch.no_grad()
def test_what_no_weight_reaches_can_go_without_a_trace(name: str, tmp_path: Path) -> None:
    """Neurons whose outputs nothing reads are the first to go, and nothing changes: in every family's layout."""
    from transformers import AutoModelForCausalLM

    base = make_base(tmp_path, name)
    model = open_model(base)
    trunk = mlp_trunk(model)
    useless = torch.arange(1, trunk.num_units, 3)
    reference = AutoModelForCausalLM.from_pretrained(base)
    parameters = dict(reference.named_parameters())
    for block in range(model.num_blocks):
        parameter = parameters[model.family.module_name(model.prefix(block) + trunk.reader.name)]
        parameter.data[(useless,) if trunk.reader.transposed else (slice(None), useless)] = 0.0
    reference.save_pretrained(base)
    slots = [trunk.reader, *(writer.slot for writer in trunk.writers)]
    entries = sum(prod(model.shape(model.prefix(0) + slot.name)) for slot in slots) // trunk.num_units
    keep = 1 - entries * len(useless) * model.num_blocks / model.num_parameters
    result = narrow(base, tmp_path / "out", {"ziplm": {"keep": keep, "multiple_of": 1}})
    found = AutoModelForCausalLM.from_pretrained(result.folder)(some_tokens()).logits
    assert open_model(result.folder).num_parameters < model.num_parameters
    torch.testing.assert_close(found, reference(some_tokens()).logits, rtol=2e-3, atol=2e-3)


@torch.no_grad()
def test_heads_go_with_their_queries_keys_and_values(tmp_path: Path) -> None:
    """A key-value head whose outputs nothing reads goes; the rest of the matrices are the very same rows."""
    from transformers import AutoModelForCausalLM

    base = make_base(tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(base)
    for layer in reference.model.layers:
        layer.self_attn.o_proj.weight.data[:, :16] = (
            0.0  # 4 query heads of 8 channels, 2 key-value heads: the first one's
        )
    reference.save_pretrained(base)
    result = narrow(base, tmp_path / "out", {"ziplm": {"keep": 1.0, "keep_heads": 0.5}})
    made = open_model(result.folder)
    before = open_model(base)
    for name, rows in (("q_proj", slice(16, 32)), ("k_proj", slice(8, 16)), ("v_proj", slice(8, 16))):
        full = f"model.layers.1.self_attn.{name}.weight"
        assert torch.equal(made.weight(full).unpack(), before.weight(full).unpack()[rows])
    found = AutoModelForCausalLM.from_pretrained(result.folder)(some_tokens()).logits
    torch.testing.assert_close(found, reference(some_tokens()).logits, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", ["minitron", "flap", "ziplm"])
def test_neurons_are_chosen_and_refitted_on_what_the_heads_left_make_of_them(name: str, tmp_path: Path) -> None:
    """Heads and neurons in one stage are the heads first, then neurons of the model without them."""
    base = make_base(tmp_path, num_hidden_layers=1)
    together = narrow(base, tmp_path / "together", stage(name, keep_heads=0.5, keep=0.7)).folder
    first = narrow(base, tmp_path / "heads", stage(name, keep_heads=0.5, keep=1.0)).folder
    (tmp_path / "heads/text.txt").write_text((tmp_path / "text.txt").read_text())
    made, headless = open_model(together), open_model(first)
    keep = (made.num_parameters + 1) / headless.num_parameters
    both = open_model(narrow(first, tmp_path / "both", stage(name, keep=keep)).folder)
    assert made.config["intermediate_size"] == both.config["intermediate_size"] < 48
    for path in made.slots():
        assert torch.equal(made.weight(path).unpack(), both.weight(path).unpack()), path


def test_a_refit_loses_less_than_mere_slices(tmp_path: Path) -> None:
    base = make_base(tmp_path)
    errors = {}
    for refit in (False, True):
        found = narrow(base, tmp_path / str(refit), stage("minitron", reconstruct=refit))
        errors[refit] = sum(found.errors.values())
    assert errors[True] < 0.9 * errors[False]


def test_a_bias_makes_up_for_the_mean(tmp_path: Path) -> None:
    base = make_base(tmp_path)
    errors = {}
    for bias in (False, True):
        found = narrow(base, tmp_path / str(bias), stage("minitron", reconstruct=False, bias=bias))
        errors[bias] = sum(found.errors.values())
    assert errors[True] < errors[False]
    assert open_model(tmp_path / "True").config["mlp_bias"]


def test_quantization_may_follow_in_the_same_recipe(tmp_path: Path) -> None:
    base = make_base(tmp_path)
    result = narrow(base, tmp_path / "out", stage(multiple_of=8), {"blocks": [GPTQ]})
    made = open_model(result.folder)
    assert made.config["intermediate_size"] % 8 == 0
    assert all(not isinstance(made.weight(name), Dense) for name in made.described)
    assert len(made.described) == 3 * 7


def test_information_is_the_squared_gradient_of_a_factor(tmp_path: Path) -> None:
    """Against autograd on transformers' own model, the labels drawn likewise."""
    from transformers import AutoModelForCausalLM

    base = make_base(tmp_path)
    model, tokens = open_model(base), some_tokens()
    edges = (head_trunk(model), mlp_trunk(model))
    found = find_information(Informing(model, edges, tokens, torch.float32, tmp_path, tmp_path, lambda _: None))
    reference = AutoModelForCausalLM.from_pretrained(base)
    factors = {}
    for block, layer in enumerate(reference.model.layers):
        for edge, module, units in (
            (edges[0].edge, layer.self_attn.o_proj, 2),
            (edges[1].edge, layer.mlp.down_proj, 48),
        ):
            factor = torch.ones(units, requires_grad=True)
            factors[block, edge] = factor
            module.register_forward_pre_hook(
                lambda _, given, f=factor: (given[0] * f.repeat_interleave(given[0].shape[-1] // len(f)), *given[1:])
            )
    wanted = {key: torch.zeros_like(factor) for key, factor in factors.items()}
    for row in range(len(tokens)):
        logits = reference(tokens[row : row + 1]).logits[0]
        labels = torch.multinomial(logits.softmax(-1), 1, generator=torch.Generator().manual_seed(row))
        loss = -logits.log_softmax(-1).gather(1, labels).sum()
        for (key, _), slope in zip(factors.items(), torch.autograd.grad(loss, list(factors.values())), strict=True):
            wanted[key] += slope.square()
    for (block, edge), total in wanted.items():
        torch.testing.assert_close(found[block][edge], total.detach(), rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("later", [stage("ziplm", keep=0.85), {"slicegpt": {"keep": 0.75, "multiple_of": 4}}])
@torch.no_grad()
def test_stages_that_change_shapes_follow_one_another(later: dict[str, Any], tmp_path: Path) -> None:
    """Blocks go, then neurons or channels, then the rest is rotated and quantized: each planned on what is left."""
    from transformers import AutoModelForCausalLM

    import decoct.hf

    base = make_base(tmp_path, num_hidden_layers=5)
    recipe = [{"sleb": {"num_dropped": 2}}, later, {"blocks": [{"quarot": {"online": False}}, GPTQ]}]
    job = make_job(base, tmp_path / "out", **stages(*recipe), data=DATA)
    plan = plan_stages(job.model, job.stages, job.data, job.budget, tmp_path / "out")
    result = compress_job(job, Watch())
    made = open_model(result.folder)
    assert decoct.hf
    assert made.num_blocks == 3
    assert result.nbytes == pytest.approx(plan.output_bytes, rel=0.05)
    assert plan.result is not None
    assert plan.result.num_parameters == made.num_parameters
    found = AutoModelForCausalLM.from_pretrained(result.folder)(some_tokens()).logits
    torch.testing.assert_close(found, predictions(made, some_tokens()), rtol=1e-3, atol=1e-3)


def test_a_killed_run_gives_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base(tmp_path)
    whole = digests(narrow(base, tmp_path / "whole", stage()).folder)
    for call in (1, 3):
        with monkeypatch.context() as patch:
            patch.setattr(_Streamer, "_save", crash_at(call, _Streamer._save))
            with pytest.raises(Crash):
                narrow(base, tmp_path / f"out{call}", stage())
        assert digests(narrow(base, tmp_path / f"out{call}", stage()).folder) == whole


def test_a_sweep_for_gradients_that_is_killed_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base(tmp_path)
    whole = digests(narrow(base, tmp_path / "whole", stage("llm_pruner")).folder)
    with monkeypatch.context() as patch:
        patch.setattr(Sweep, "commit", crash_at(2, Sweep.commit, after=True))
        with pytest.raises(Crash):
            narrow(base, tmp_path / "out", stage("llm_pruner"))
    assert list((tmp_path / "out/.run/stage-0").glob("information-*"))
    assert digests(narrow(base, tmp_path / "out", stage("llm_pruner")).folder) == whole


def test_a_fresh_run_takes_nothing_from_a_discarded_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even what lies in a scratch folder of its own."""
    base = make_base(tmp_path)
    words = (tmp_path / "text.txt").read_text()
    (tmp_path / "other.txt").write_text(words[::-1])
    other = {**DATA, "source": str(tmp_path / "other.txt")}
    scratch = {"budget": {"scratch": str(tmp_path / "scratch")}}
    recipe = stages(stage("llm_pruner", keep_heads=0.5))
    clean = digests(compress_job(make_job(base, tmp_path / "clean", **recipe, data=other), Watch()).folder)
    with monkeypatch.context() as patch:
        patch.setattr(Sweep, "commit", crash_at(3, Sweep.commit, after=True))
        with pytest.raises(Crash):
            compress_job(make_job(base, tmp_path / "out", **recipe, data=DATA, **scratch), Watch())
    again = make_job(base, tmp_path / "out", fresh=True, **recipe, data=other, **scratch)
    assert digests(compress_job(again, Watch()).folder) == clean


def test_blocks_go_after_channels_too(tmp_path: Path) -> None:
    """The size of what is left is counted on what the stages before have left."""
    base = make_base(tmp_path, num_hidden_layers=5)
    for first in ({"slicegpt": {"keep": 0.5, "multiple_of": 4}}, stage("ziplm")):
        job = make_job(base, tmp_path / next(iter(first)), **stages(first, {"shortgpt": {"num_dropped": 4}}), data=DATA)
        plan = plan_stages(job.model, job.stages, job.data, job.budget, None)
        assert compress_job(job, Watch()).nbytes == plan.output_bytes


def test_what_cannot_be_narrowed_is_refused_while_planning(tmp_path: Path) -> None:
    def plan(name: str, **settings: Any) -> None:
        folder = tmp_path / name
        base = folder / "base" if (folder / "base").exists() else make_base(folder, name)
        job = make_job(base, folder / "out", **stages(stage(**settings)), data=DATA)
        plan_stages(job.model, job.stages, job.data, job.budget, None)

    with pytest.raises(ValueError, match="a mixtral block has no single MLP"):
        plan("mixtral")
    with pytest.raises(ValueError, match="heads of a gpt2 model cannot be taken out"):
        plan("gpt2", keep_heads=0.5)
    with pytest.raises(ValueError, match="a norm over all heads of a olmo2 block"):
        plan("olmo2", keep_heads=0.5)
    with pytest.raises(ValueError, match=r"no place for mlp\.down_proj.bias; set bias: false"):
        plan("qwen2", bias=True)
    with pytest.raises(ValueError, match=r"leaves fewer than 4 of 48 neurons.* set keep to 0\.\d+ at least"):
        plan("llama", keep=0.1)
    with pytest.raises(ValueError, match=r"keep_heads=0\.9 takes out none of 2"):
        plan("llama", keep_heads=0.9)
    with pytest.raises(RecipeError, match="nothing would be taken out"):
        parse_recipe({"stages": [{"ziplm": {"keep": 1.0}}]})


def test_compressed_matrices_are_not_narrowed(tmp_path: Path) -> None:
    base = make_base(tmp_path)
    small = compress_job(make_job(base, tmp_path / "w4", GPTQ), Watch()).folder
    job = make_job(small, tmp_path / "out", **stages(stage()))
    with pytest.raises(ValueError, match="is compressed already"):
        plan_stages(job.model, job.stages, job.data, job.budget, None)


def test_rows_of_grouped_queries(tmp_path: Path) -> None:
    trunk = head_trunk(open_model(make_base(tmp_path)))
    assert (trunk.unit, trunk.num_units) == (16, 2)
    rows = {writer.slot.role: writer.row_numbers(torch.tensor([1]), 2).tolist() for writer in trunk.writers}
    assert rows == {"attn.q": [*range(16, 32)], "attn.k": [*range(8, 16)], "attn.v": [*range(8, 16)]}


def test_magnitude_counts_every_weight_of_a_head_once(tmp_path: Path) -> None:
    """Keys and values that two query heads read included."""
    model = open_model(make_base(tmp_path))
    weights = {model.prefix(1) + slot.name: model.weight(model.prefix(1) + slot.name) for slot in model.block_slots}
    q, k, v, o = (weights[f"model.layers.1.self_attn.{name}_proj.weight"].unpack() for name in "qkvo")
    found = MagnitudeWidth().scores(channels_of(weights, {}, model.prefix(1), head_trunk(model), None))
    for head in range(2):
        query, key = slice(16 * head, 16 * head + 16), slice(8 * head, 8 * head + 8)
        expected = sum(float(part.square().sum()) for part in (q[query], k[key], v[key], o[:, query]))
        assert float(found[head]) == pytest.approx(expected, rel=1e-5)


def test_keep_counts_the_whole_model(tmp_path: Path) -> None:
    model = open_model(make_base(tmp_path))
    for keep in (0.95, 0.85, 0.75):
        left = NarrowModel.of(model, METHODS["ziplm"](keep=keep, multiple_of=1))  # type: ignore[arg-type]
        count = sum(left.shape(name)[0] * left.shape(name)[1] for name in left.slots())
        count += model.num_parameters - sum(model.shape(n)[0] * model.shape(n)[1] for n in model.slots())
        assert keep - 0.02 < count / model.num_parameters <= keep


def test_more_is_taken_out_than_was_asked_and_the_plan_says_so(tmp_path: Path) -> None:
    base = make_base(tmp_path)
    jobs = [
        make_job(base, tmp_path / "out", stages=[{"ziplm": {"keep": 0.8, "multiple_of": step}}], data=DATA)
        for step in (16, 1)
    ]
    rough, fine = (plan_stages(each.model, each.stages, each.data, each.budget, None).stages[0] for each in jobs)
    assert rough.share_left is not None
    assert rough.notes == (
        (
            f"{rough.share_left:.0%} of the parameters are left, not 80%: the number of neurons is rounded down to a "
            "multiple of 16; set ziplm.multiple_of to less"
        ),
    )
    assert fine.notes == ()


def test_a_plan_tells_what_share_is_left_where_shapes_do_not(tmp_path: Path) -> None:
    """Uneven widths and blocks without an attention keep their config."""
    base = make_base(tmp_path)
    wanted: list[dict[str, Any]] = [
        {"ziplm": {"keep": 0.8, "multiple_of": 1, "uneven": True}},
        {"blockpruner": {"num_dropped": 1}},
        {"slicegpt": {"keep": 0.75, "multiple_of": 4}},
    ]
    for each in wanted:
        job = make_job(base, tmp_path / "out", stages=[each], data=DATA)
        plan = plan_stages(job.model, job.stages, job.data, job.budget, None).stages[0]
        assert plan.share_left is not None
        assert plan.share_left < 0.9, each


def test_a_result_that_grows_is_told(tmp_path: Path) -> None:
    base = make_base(tmp_path, dtype=torch.bfloat16)
    job = make_job(base, tmp_path / "out", {"linear": {"wanda": {"sparsity": 0.03}}})
    (note,) = plan_stages(job.model, job.stages, job.data, job.budget, None).stages[0].notes
    assert note.startswith("the result is larger (")

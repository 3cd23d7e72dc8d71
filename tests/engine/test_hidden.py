"""Taking out channels of the residual stream: chosen as the methods' formulas say, and a plain smaller checkpoint."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from decoct.engine import find_channels
from decoct.engine.compress import compress_job
from decoct.engine.find_channels import Thinning, _look, _residual, thinned
from decoct.engine.job import Watch
from decoct.engine.stages import plan_stages
from decoct.methods import METHODS
from decoct.methods.width import WidthMethod
from decoct.model import open_model
from decoct.recipe import RecipeError, parse_recipe
from tests.engine.running import GPTQ, Crash, crash_at, digests, make_base, make_job
from tests.engine.test_depth import stages
from tests.engine.test_rotate import predictions, some_tokens

SCORING = ["magnitude_width", "minitron", "flap"]
DATA = {"num_sequences": 8, "sequence_length": 32}


def stage(name: str = "minitron", **settings: Any) -> dict[str, Any]:
    return {name: {"keep": 1.0, "keep_hidden": 0.75, "multiple_of": 4, **settings}}


def thin(base: Path, out: Path, *given: dict[str, Any]) -> Any:
    return compress_job(make_job(base, out, **stages(*given), data=DATA), Watch())


def method_of(name: str, **settings: Any) -> WidthMethod:
    made = METHODS[name](**{"keep": 1.0, "keep_hidden": 0.75, "multiple_of": 4, **settings})
    assert isinstance(made, WidthMethod)
    return made


def by_formula(base: Path, name: str, tokens: Tensor) -> list[float]:
    """Each channel's score, in float64, from transformers' own model and its norms' outputs; the slow way."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base).double()
    inner = model.model
    outputs: dict[Any, Tensor] = {}
    norms = [norm for layer in inner.layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
    readers = [
        matrices
        for layer in inner.layers
        for matrices in (
            [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj],
            [layer.mlp.gate_proj, layer.mlp.up_proj],
        )
    ]
    norms, readers = [*norms, inner.norm], [*readers, [model.lm_head]]
    for norm in norms:
        norm.register_forward_hook(lambda module, _, output: outputs.__setitem__(module, output.flatten(0, 1)))
    model(tokens)
    writers = [matrix for layer in inner.layers for matrix in (layer.self_attn.o_proj, layer.mlp.down_proj)]
    scores = []
    for channel in range(model.config.hidden_size):
        total = 0.0
        if name == "magnitude_width":
            total += sum(float(value) ** 2 for value in inner.embed_tokens.weight[:, channel])
            total += sum(float(value) ** 2 for matrix in writers for value in matrix.weight[channel])
        for norm, matrices in zip(norms, readers, strict=True):
            columns = sum(float(value) ** 2 for matrix in matrices for value in matrix.weight[:, channel])
            values = [float(value) for value in outputs[norm][:, channel]]
            mean = sum(values) / len(values)
            total += {
                "magnitude_width": columns * float(norm.weight[channel]) ** 2,
                "minitron": sum(abs(value) for value in values) / len(values),
                "flap": columns * sum((value - mean) ** 2 for value in values) / len(values),
            }[name]
        scores.append(total)
    return scores


@pytest.mark.parametrize("name", SCORING)
@pytest.mark.parametrize("kind", ["llama", "llama-tied"])
@torch.no_grad()
def test_scores_are_those_of_the_formulas(name: str, kind: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base = make_base(tmp_path, kind)
    reference = AutoModelForCausalLM.from_pretrained(base)
    for number, (_, parameter) in enumerate((n, p) for n, p in reference.named_parameters() if "norm" in n):
        parameter.copy_(torch.rand(len(parameter), generator=torch.Generator().manual_seed(number)) + 0.5)
    reference.save_pretrained(base)
    tokens, method = some_tokens(), method_of(name)
    todo = Thinning(open_model(base), method, tokens, torch.float32, tmp_path, lambda _: None)
    found = method.hidden_scores(_residual(_look(todo)))
    torch.testing.assert_close(found, torch.tensor(by_formula(base, name, tokens)).double(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", SCORING)
@pytest.mark.parametrize("kind", ["llama", "llama-tied", "mistral", "qwen2", "qwen3", "mixtral"])
@torch.no_grad()
def test_stock_transformers_loads_what_is_left(name: str, kind: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base = make_base(tmp_path, kind)
    job = make_job(base, tmp_path / "out", **stages(stage(name)), data=DATA)
    plan = plan_stages(job.model, job.stages, job.data, job.budget, None)
    result = compress_job(job, Watch())
    made = open_model(result.folder)
    assert made.config["hidden_size"] == 24
    assert made.config["head_dim"] == open_model(base).family.head_size(open_model(base).config)
    assert made.tied == open_model(base).tied
    assert not made.described
    assert "quantization_config" not in made.config
    assert result.nbytes == plan.output_bytes
    assert plan.result is not None
    assert made.num_parameters == plan.result.num_parameters
    share = plan.stages[0].share_left
    assert share == pytest.approx(made.num_parameters / open_model(base).num_parameters)
    found = AutoModelForCausalLM.from_pretrained(result.folder)(some_tokens()).logits
    torch.testing.assert_close(found, predictions(made, some_tokens()), rtol=1e-3, atol=1e-4)


def idle(base: Path, gone: Tensor) -> Any:
    """The model with channels that nothing writes; its norms then divide by what the others alone have."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.get_input_embeddings().weight[:, gone] = 0.0
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter[gone] = 0.0
    model.save_pretrained(base)
    return model


@pytest.mark.parametrize("name", ["minitron", "flap"])
@torch.no_grad()
def test_channels_that_nothing_writes_go_without_a_trace(name: str, tmp_path: Path) -> None:
    """Also the norms' scale is exact then: the mean square of what is left is the same multiple for every token."""
    from transformers import AutoModelForCausalLM

    base = make_base(tmp_path)
    gone = torch.arange(1, 32, 4)
    reference = idle(base, gone)
    made = thin(base, tmp_path / "out", stage(name)).folder
    found = AutoModelForCausalLM.from_pretrained(made)(some_tokens()).logits
    torch.testing.assert_close(found, reference(some_tokens()).logits, rtol=2e-3, atol=2e-3)
    stays = [channel for channel in range(32) if channel not in gone]
    table = open_model(base).weight("model.embed_tokens.weight").unpack()
    assert torch.equal(open_model(made).weight("model.embed_tokens.weight").unpack(), table[:, stays])


@torch.no_grad()
def test_norms_put_out_as_much_as_before(tmp_path: Path) -> None:
    """The gain's factor: the root mean square, over tokens, of what is left once all of it is scaled to 1."""
    base = make_base(tmp_path)
    model, method = open_model(base), method_of("minitron", reconstruct=False)
    todo = Thinning(model, method, some_tokens(), torch.float32, tmp_path / "found", lambda _: None)
    left = thinned(todo)
    assert left.selection is not None
    states = model.weight("model.embed_tokens.weight").unpack(torch.float64)[some_tokens()].flatten(0, 1)
    scaled = states / states.square().mean(1, keepdim=True).sqrt()
    factor = scaled[:, left.selection.kept].square().mean().sqrt()
    name = "model.layers.0.input_layernorm.weight"
    torch.testing.assert_close(left.tensor(name), model.tensor(name)[left.selection.kept] * factor.float())


@torch.no_grad()
def test_what_is_left_stands_in_for_what_is_gone(tmp_path: Path) -> None:
    """Channels that are copies of others: matrices behind norms take them over, almost without loss."""
    from transformers import AutoModelForCausalLM

    base = make_base(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.get_input_embeddings().weight[:, 24:] = 0.5 * model.get_input_embeddings().weight[:, :8]
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter[24:] = 0.5 * parameter[:8]
    model.save_pretrained(base)
    wanted, errors = model(some_tokens()).logits, []
    for refit in (True, False):
        out = thin(base, tmp_path / f"out{refit}", stage("minitron", reconstruct=refit)).folder
        errors.append(float((AutoModelForCausalLM.from_pretrained(out)(some_tokens()).logits - wanted).norm()))
    assert errors[0] < 0.5 * errors[1]


@torch.no_grad()
def test_all_channels_change_nothing(tmp_path: Path) -> None:
    base = make_base(tmp_path)
    plain = {"minitron": {"keep": 0.8, "multiple_of": 4}}
    same = {"minitron": {"keep": 0.8, "multiple_of": 4, "keep_hidden": 1.0}}
    one, two = (thin(base, tmp_path / name, given).folder for name, given in (("a", plain), ("b", same)))
    for shard in sorted(one.glob("*.safetensors")):
        assert shard.read_bytes() == (two / shard.name).read_bytes()


@torch.no_grad()
def test_neurons_and_heads_go_along_and_quantization_follows(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    import decoct.hf

    base = make_base(tmp_path)
    both = stage("minitron", keep=0.6, keep_hidden=0.75, keep_heads=0.5)
    job = make_job(base, tmp_path / "out", **stages(both, {"blocks": [GPTQ]}), data=DATA)
    plan = plan_stages(job.model, job.stages, job.data, job.budget, tmp_path / "out")
    made = open_model(compress_job(job, Watch()).folder)
    assert decoct.hf
    assert made.config["hidden_size"] == 24
    assert made.config["num_attention_heads"] == 2
    assert made.config["intermediate_size"] < 48
    assert 0.5 < made.num_parameters / open_model(base).num_parameters <= 0.6
    assert plan.stages[0].share_left == pytest.approx(made.num_parameters / open_model(base).num_parameters)
    assert len(made.described) == 3 * 7
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(some_tokens()).logits
    torch.testing.assert_close(found, predictions(made, some_tokens()), rtol=1e-3, atol=1e-3)


def test_a_killed_run_gives_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from decoct.engine import stream

    base, given = make_base(tmp_path), stage(keep=0.7)
    whole = digests(thin(base, tmp_path / "whole", given).folder)
    places = [(find_channels, "save_safetensors", call) for call in (2, 5)] + [(stream, "write_shard", 2)]
    for number, (module, name, call) in enumerate(places):
        out = tmp_path / f"out{number}"
        with monkeypatch.context() as patch:
            patch.setattr(module, name, crash_at(call, getattr(module, name), after=True))
            with pytest.raises(Crash):
                thin(base, out, given)
        assert digests(thin(base, out, given).folder) == whole


def test_what_cannot_lose_channels_is_refused_while_planning(tmp_path: Path) -> None:
    def plan(name: str, **settings: Any) -> Any:
        folder = tmp_path / name
        base = folder / "base" if (folder / "base").exists() else make_base(folder, name)
        job = make_job(base, folder / "out", **stages(stage(**settings)), data=DATA)
        return plan_stages(job.model, job.stages, job.data, job.budget, None).stages[0]

    with pytest.raises(ValueError, match="the residual stream of gemma2 cannot lose channels"):
        plan("gemma2")
    with pytest.raises(ValueError, match="norms subtract the mean"):
        plan("gpt2")
    with pytest.raises(ValueError, match=r"keep_hidden=0\.1 of 32 channels leaves 0, in steps of 4"):
        plan("llama", keep_hidden=0.1)
    with pytest.raises(ValueError, match=r"alone leave less than keep=0\.9"):
        plan("llama", keep=0.9)
    for name in ("ziplm", "llm_pruner", "sheared_llama"):
        with pytest.raises(RecipeError, match="not hidden channels; set it to 1, or take minitron"):
            parse_recipe({"stages": [{name: {"keep_hidden": 0.75}}]})
    with pytest.raises(RecipeError, match="keep_hidden must be above 0 and at most 1"):
        parse_recipe({"stages": [{"minitron": {"keep_hidden": 1.5}}]})
    with pytest.raises(RecipeError, match="uneven is for neurons alone"):
        parse_recipe({"stages": [{"minitron": {"keep_hidden": 0.9, "uneven": True}}]})


def test_the_plan_says_what_rounding_leaves(tmp_path: Path) -> None:
    """Llama wants a multiple of its 4 heads, whatever `multiple_of` says; Mistral does not."""
    for name, width in (("llama", 28), ("mistral", 29)):
        base = make_base(tmp_path / name, name)
        given = stage("minitron", keep_hidden=0.92, multiple_of=1)
        job = make_job(base, tmp_path / name / "out", **stages(given), data=DATA)
        plan = plan_stages(job.model, job.stages, job.data, job.budget, None)
        assert plan.result is not None
        assert plan.result.config["hidden_size"] == width
        said = (
            "28 of 32 hidden channels are left, 87.5 % and not 92.0 %: their number is rounded down to a multiple of "
            "4; the architecture asks for that"
        )
        assert plan.stages[0].notes == ((said,) if name == "llama" else ())


@torch.no_grad()
def test_a_real_model_loads_anywhere_and_gains_by_the_refit(stories: Path, story_text: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    import decoct

    data = {"source": str(story_text), "num_sequences": 16, "sequence_length": 128}
    divergences = []
    for refit in (True, False):
        given, out = stage(multiple_of=8, reconstruct=refit), tmp_path / str(refit)
        decoct.compress(stories, {"stages": [given], "data": data}, out)
        found = decoct.evaluate(out, text=story_text, against=stories, windows=4, length=128)
        assert found.kl_mean is not None
        divergences.append(found.kl_mean)
    assert divergences[0] < divergences[1]
    made = open_model(tmp_path / "True")
    assert made.config["hidden_size"] == 48
    assert made.config["head_dim"] == 8
    assert made.tied
    tokens = torch.randint(3, 500, (2, 24), generator=torch.Generator().manual_seed(5))
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "True")(tokens).logits
    torch.testing.assert_close(stock, decoct.load(tmp_path / "True")(tokens).logits, rtol=1e-3, atol=1e-3)

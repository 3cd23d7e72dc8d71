"""SliceGPT: what no component carries can go without a trace, and what is left is a plain checkpoint."""

from pathlib import Path
from typing import Any

import pytest
import torch

from decoct.engine.compress import compress_job
from decoct.engine.job import Watch
from decoct.engine.journal import Journal
from decoct.engine.sliced import Slicing, _components
from decoct.engine.stages import plan_stages
from decoct.methods.prune.slicegpt import SliceGPT
from decoct.model import open_model
from decoct.recipe import RecipeError, parse_recipe
from tests.engine.running import GPTQ, Crash, crash_at, digests, make_base, make_job
from tests.engine.test_depth import stages
from tests.engine.test_rotate import predictions, some_tokens

DATA = {"num_sequences": 8, "sequence_length": 32}


def slice_stage(keep: float = 0.75) -> dict[str, Any]:
    return {"slicegpt": {"keep": keep, "multiple_of": 4}}


def sliced(base: Path, out: Path, *given: dict[str, Any]) -> Any:
    return compress_job(make_job(base, out, *(), **stages(*given), data=DATA), Watch())


def in_a_subspace(base: Path, rank: int) -> Any:
    """The model with a residual stream of only `rank` dimensions, in no basis in particular."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    width = model.config.hidden_size
    frame = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(4)))[0][:, :rank]
    onto = frame @ frame.T
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(model.get_input_embeddings().weight @ onto)
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.copy_(onto @ parameter)
            elif name.endswith("experts.down_proj"):
                parameter.copy_(torch.einsum("ij,ejk->eik", onto, parameter))
    model.save_pretrained(base)
    return model


@pytest.mark.parametrize("name", ["llama", "llama-tied", "mistral", "qwen2", "qwen3", "mixtral"])
@torch.no_grad()
def test_components_that_carry_nothing_go_without_a_trace(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base = make_base(tmp_path, name)
    reference = in_a_subspace(base, 24)
    result = sliced(base, tmp_path / "out", slice_stage(0.75))
    made = open_model(result.folder)
    assert made.config["hidden_size"] == 24
    assert not made.described
    found = AutoModelForCausalLM.from_pretrained(result.folder)(some_tokens()).logits
    torch.testing.assert_close(found, reference(some_tokens()).logits, rtol=5e-3, atol=5e-3)
    torch.testing.assert_close(found, predictions(made, some_tokens()), rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_the_components_with_most_are_kept(tmp_path: Path) -> None:
    """Dropping the least components loses less than the same number of any others."""
    base = make_base(tmp_path)
    losses = []
    for turned in (False, True):
        out = tmp_path / f"out{turned}"
        with pytest.MonkeyPatch.context() as patch:
            if turned:
                patch.setattr("decoct.engine.sliced._components", lambda todo: _components(todo).flip(0))
            result = sliced(base, out, slice_stage(0.75))
        logp = predictions(open_model(result.folder), some_tokens()).double().log_softmax(-1)
        wanted = predictions(open_model(base), some_tokens()).double().log_softmax(-1)
        losses.append(float((wanted.exp() * (wanted - logp)).sum(-1).mean()))
    assert losses[0] < losses[1]


@torch.no_grad()
def test_components_are_those_of_what_the_norms_read(tmp_path: Path) -> None:
    """In their basis the second moments are diagonal; states taken from transformers' own model."""
    from transformers import AutoModelForCausalLM

    base, tokens = make_base(tmp_path), some_tokens()
    todo = Slicing(
        SliceGPT(keep=0.75, multiple_of=4),
        open_model(base),
        tokens,
        torch.float32,
        tmp_path,
        Journal(tmp_path / "journal", {}, tmp_path),
        lambda _: None,
    )
    found = _components(todo)
    model = AutoModelForCausalLM.from_pretrained(base)
    states: list[torch.Tensor] = []
    for name, module in model.named_modules():
        if name.endswith(("layernorm", "model.norm")):
            module.register_forward_pre_hook(lambda _, given: states.append(given[0].flatten(0, 1).double()))
    model(tokens)
    scaled = torch.cat([x / x.square().mean(1, keepdim=True).sqrt() for x in states])
    moments = found @ (scaled.T @ scaled) @ found.T
    assert (moments - moments.diagonal().diag()).norm() < 1e-4 * moments.norm()


def test_sizes_are_as_planned_and_quantization_may_follow(tmp_path: Path) -> None:
    base = make_base(tmp_path)
    job = make_job(base, tmp_path / "out", **stages(slice_stage()), data=DATA)
    plan = plan_stages(job.model, job.stages, job.data, job.budget, None)
    assert compress_job(job, Watch()).nbytes == plan.output_bytes
    result = sliced(base, tmp_path / "w4", slice_stage(), {"blocks": [GPTQ]})
    assert len(open_model(result.folder).described) == 3 * 7


def test_a_killed_run_gives_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from decoct.engine import copy

    base = make_base(tmp_path)
    whole = digests(sliced(base, tmp_path / "whole", slice_stage()).folder)
    for call in (0, 2):
        with monkeypatch.context() as patch:
            patch.setattr(copy, "write_shard", crash_at(call, copy.write_shard, after=True))
            with pytest.raises(Crash):
                sliced(base, tmp_path / f"out{call}", slice_stage())
        assert digests(sliced(base, tmp_path / f"out{call}", slice_stage()).folder) == whole


def test_what_cannot_be_sliced_is_refused_while_planning(tmp_path: Path) -> None:
    def plan(name: str, keep: float = 0.75, **changes: Any) -> None:
        folder = tmp_path / f"{name}{len(changes)}"
        base = folder / "base" if (folder / "base").exists() else make_base(folder, name, **changes)
        job = make_job(base, folder / "out", **stages(slice_stage(keep)), data=DATA)
        plan_stages(job.model, job.stages, job.data, job.budget, None)

    with pytest.raises(ValueError, match="the residual stream of gemma2 cannot be rotated"):
        plan("gemma2")
    with pytest.raises(ValueError, match="norms subtract the mean"):
        plan("gpt2")
    with pytest.raises(ValueError, match=r"keep=0\.1 of 32 channels leaves 0"):
        plan("llama", 0.1)
    with pytest.raises(ValueError, match="would be larger"):
        plan("llama-tied", 0.9, vocab_size=4096)
    with pytest.raises(RecipeError, match="keep must lie between 0 and 1"):
        parse_recipe({"stages": [{"slicegpt": {"keep": 1.5}}]})

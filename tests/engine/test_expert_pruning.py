"""Fewer experts: a plain smaller checkpoint, of exactly those that were chosen, or of what they were merged into."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM

from decoct.engine.admission import calibration_tokens
from decoct.engine.compress import compress_job
from decoct.engine.job import Watch
from decoct.engine.stages import plan_stages
from decoct.engine.stream import Event, _Streamer
from decoct.methods.prune.hc_smoe import HCSMoE, MeanAnswers
from decoct.methods.prune.reap import REAP, GatedNorms
from decoct.model import Model, open_model
from decoct.ops.clustering import Linkage, agglomerate
from decoct.recipe import RecipeError, parse_recipe
from decoct.weights import Dense
from tests.engine.running import GPTQ, Crash, crash_at, digests, make_base, make_job
from tests.engine.test_depth import stages
from tests.engine.test_experts import EXPERTS, MIXTURES
from tests.engine.test_rotate import predictions, some_tokens
from tests.reference import experts as slow
from tests.reference.inputs import gaussian

BOTH = pytest.mark.parametrize("method", ["reap", "hc_smoe"])
DATA = {"num_sequences": 8, "sequence_length": 32}
FEW = {"num_sequences": 1, "sequence_length": 2}


def make(folder: Path, name: str, **changes: Any) -> Path:
    """A tiny mixture of six experts."""
    key = "num_local_experts" if name == "mixtral" else "num_experts"
    return make_base(folder, name, **{key: 6, "num_hidden_layers": 2, **changes})


def reduce(base: Path, out: Path, *given: dict[str, Any], data: Any = DATA, watch: Watch | None = None) -> Any:
    return compress_job(make_job(base, out, **stages(*given), data=data), watch or Watch())


def router(model: Model, block: int) -> Tensor:
    return model.weight(
        next(n for n, s in model.slots().items() if s.role == "moe.router" and f".{block}." in n)
    ).unpack()


def matrices(model: Model, block: int, expert: int, name: str) -> list[Tensor]:
    pattern, *parts = EXPERTS[name]
    return [model.weight(f"{model.prefix(block)}{pattern.format(expert)}{part}.weight").unpack() for part in parts]


@torch.no_grad()
def seen(base: Path, job_folder: Path, data: Any = DATA) -> tuple[Tensor, list[Tensor]]:
    """Of block 0, in float64 from transformers' hidden states: gates, and each expert's answers to all tokens."""
    name = open_model(base).family.name
    tokens = calibration_tokens(
        make_job(base, job_folder / "o", **stages({"reap": {}}), data=data), job_folder, Watch()
    )
    reference = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64, experts_implementation="eager")
    read: list[Tensor] = []
    reference.model.layers[0].mlp.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    reference(tokens)
    x, model = torch.cat(read).reshape(-1, read[0].shape[-1]), open_model(base)
    chances = (x @ router(model, 0).double().T).softmax(-1)
    best = chances.topk(2, dim=-1)
    shares = best.values
    if name == "mixtral" or reference.config.norm_topk_prob:
        shares = shares / shares.sum(-1, keepdim=True)
    gates = torch.zeros_like(chances).scatter(-1, best.indices, shares)
    answers = []
    for expert in range(chances.shape[1]):
        gate, up, down = (m.double() for m in matrices(model, 0, expert, name))
        answers.append((functional.silu(x @ gate.T) * (x @ up.T)) @ down.T)
    return gates, answers


@BOTH
@MIXTURES
@torch.no_grad()
def test_stock_transformers_loads_what_is_left(name: str, method: str, tmp_path: Path) -> None:
    base = make(tmp_path, name)
    job = make_job(base, tmp_path / "out", **stages({method: {"keep": 0.5}}), data=DATA)
    plan = plan_stages(job.model, job.stages, job.data, job.budget, None)
    told: list[Event] = []
    result = compress_job(job, Watch(event=told.append))
    made = open_model(result.folder)
    loaded = AutoModelForCausalLM.from_pretrained(result.folder)
    assert loaded.config.num_local_experts == 3
    assert loaded.config.num_experts_per_tok == 2
    assert "quantization_config" not in made.config
    assert made.num_parameters < 0.7 * job.model.num_parameters
    assert result.nbytes == made.nbytes == plan.output_bytes
    assert {group.role for group in plan.stages[0].groups} == {"moe.router", "moe.gate", "moe.up", "moe.down"}
    torch.testing.assert_close(loaded(some_tokens()).logits, predictions(made, some_tokens()), rtol=1e-3, atol=1e-4)
    assert [event.part for event in told] == ["embedding", "block 0", "block 1", "lm_head"]
    assert all(0 < result.errors[f"block {block}"] < 2 for block in range(2))


@MIXTURES
def test_reap_keeps_the_salient_ones_as_they_are(name: str, tmp_path: Path) -> None:
    """Against the formula on transformers' own hidden states: which stay, and that they are the very same."""
    base = make(tmp_path, name)
    gates, answers = seen(base, tmp_path)
    saliency = slow.saliencies(gates.tolist(), [each.tolist() for each in answers])
    best = sorted(sorted(range(6), key=lambda e: -saliency[e])[:3])
    before, made = open_model(base), open_model(reduce(base, tmp_path / "out", {"reap": {"keep": 0.5}}).folder)
    assert torch.equal(router(made, 0), router(before, 0)[best])
    for new, old in enumerate(best):
        assert all(map(torch.equal, matrices(made, 0, new, name), matrices(before, 0, old, name)))


@MIXTURES
@torch.no_grad()
def test_hc_smoe_merges_what_answers_alike(name: str, tmp_path: Path) -> None:
    """Against the definition on transformers' own hidden states: groups, shares, matrices and router rows."""
    base = make(tmp_path, name)
    gates, answers = seen(base, tmp_path)
    found = slow.groups(slow.means([each.tolist() for each in answers]), 3, "average")
    counts = (gates > 0).sum(0).tolist()
    before, made = open_model(base), open_model(reduce(base, tmp_path / "out", {"hc_smoe": {"keep": 0.5}}).folder)
    assert len(found) == 3
    assert any(len(group) > 1 for group in found)
    for new, group in enumerate(found):
        shares = slow.merged(group, counts)
        for part, matrix in enumerate(matrices(made, 0, new, name)):
            wanted = sum(s * matrices(before, 0, e, name)[part].double() for s, e in zip(shares, group, strict=True))
            torch.testing.assert_close(matrix.double(), wanted, rtol=1e-5, atol=1e-6)
        row = sum(s * router(before, 0)[e].double() for s, e in zip(shares, group, strict=True))
        torch.testing.assert_close(router(made, 0)[new].double(), row, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("linkage", ["average", "complete", "single"])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_clusters_are_those_of_the_definition(linkage: Linkage, seed: int) -> None:
    points = gaussian(12, 3, seed=seed).double()
    for count in (1, 4, 7, 12):
        labels = agglomerate(torch.cdist(points, points), count, linkage)
        found = [(labels == group).nonzero()[:, 0].tolist() for group in range(count)]
        assert found == slow.groups(points.tolist(), count, linkage)


def test_equally_near_items_are_joined_in_order() -> None:
    assert agglomerate(1 - torch.eye(5), 3).tolist() == [0, 0, 0, 1, 2]


def test_the_mean_is_over_an_experts_own_tokens() -> None:
    """A few tokens with strong answers count more than many with weak ones; without tokens the saliency is 0."""
    stat = GatedNorms(3, 2)
    stat.num_sent = torch.tensor([10, 2, 0])
    stat.add(0, torch.tensor([[3.0, 4.0]]).expand(10, 2), torch.full((10,), 0.1))
    stat.add(1, torch.tensor([[3.0, 4.0]]).expand(2, 2), torch.full((2,), 0.2))
    torch.testing.assert_close(stat.saliency(), torch.tensor([0.5, 1.0, 0.0], dtype=torch.float64))
    assert REAP().mixture(stat, 1).tolist() == [[0, 1, 0]]
    assert REAP().mixture(stat, 2).tolist() == [[1, 0, 0], [0, 1, 0]]


def test_a_group_without_tokens_is_merged_alike() -> None:
    stat = MeanAnswers(4, 1)
    for expert, value in enumerate((0.0, 0.1, 5.0, 5.1)):
        stat.add(expert, torch.full((2, 1), value), torch.zeros(2))
    stat.num_sent = torch.tensor([3, 1, 0, 0])
    assert HCSMoE().mixture(stat, 2).tolist() == [[0.75, 0.25, 0, 0], [0, 0, 0.5, 0.5]]


@MIXTURES
@torch.no_grad()
def test_an_expert_that_adds_nothing_goes_first(name: str, tmp_path: Path) -> None:
    """Tokens are sent to it, but its last matrix is zero."""
    base = make(tmp_path, name)
    reference = AutoModelForCausalLM.from_pretrained(base)
    for layer in reference.model.layers:
        layer.mlp.experts.down_proj.data[3] = 0.0
    reference.save_pretrained(base)
    result = reduce(base, tmp_path / "out", {"reap": {"keep": 5 / 6}})
    before, made = open_model(base), open_model(result.folder)
    assert not result.starved
    for block in range(2):
        assert torch.equal(router(made, block), router(before, block)[[0, 1, 2, 4, 5]])


@MIXTURES
@torch.no_grad()
def test_a_starved_expert_goes_first_is_named_and_nothing_changes(name: str, tmp_path: Path) -> None:
    """Channel 0 of the stream is made constant, and an expert's router row turned against it: nobody asks it."""
    base = make(tmp_path, name)
    reference = AutoModelForCausalLM.from_pretrained(base)
    reference.model.embed_tokens.weight *= 8.0
    reference.model.embed_tokens.weight[:, 0] = 4.0
    for layer in reference.model.layers:
        layer.self_attn.o_proj.weight[0] = 0.0
        layer.mlp.experts.down_proj[:, 0] = 0.0
        layer.mlp.experts.down_proj[3] *= 100.0  # it would be missed
        layer.mlp.gate.weight[:, 0] = 0.0
        layer.mlp.gate.weight[3] = 0.0
        layer.mlp.gate.weight[3, 0] = -50.0
    reference.save_pretrained(base)
    result = reduce(base, tmp_path / "out", {"reap": {"keep": 5 / 6}})
    pattern, *parts = EXPERTS[name]
    names = [f"model.layers.{block}.{pattern.format(3)}{part}.weight" for block in range(2) for part in parts]
    assert list(result.starved) == names
    loaded = AutoModelForCausalLM.from_pretrained(result.folder)
    torch.testing.assert_close(loaded(some_tokens()).logits, reference(some_tokens()).logits, rtol=1e-4, atol=1e-5)
    assert all(error < 1e-9 for error in result.errors.values())


@MIXTURES
@torch.no_grad()
def test_twins_are_merged_without_a_trace(name: str, tmp_path: Path) -> None:
    """Pairs of equal experts: what they become is what each of them was."""
    base = make(tmp_path, name, num_hidden_layers=1)
    reference = AutoModelForCausalLM.from_pretrained(base)
    experts = reference.model.layers[0].mlp.experts
    for first in (0, 2, 4):
        experts.gate_up_proj[first + 1] = experts.gate_up_proj[first]
        experts.down_proj[first + 1] = experts.down_proj[first]
    reference.save_pretrained(base)
    before, made = open_model(base), open_model(reduce(base, tmp_path / "out", {"hc_smoe": {"keep": 0.5}}).folder)
    for new in range(3):
        for one, other in zip(matrices(made, 0, new, name), matrices(before, 0, 2 * new, name), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@BOTH
@MIXTURES
def test_quantization_may_follow_in_the_same_recipe(name: str, method: str, tmp_path: Path) -> None:
    base = make(tmp_path, name)
    job = make_job(base, tmp_path / "out", **stages({method: {}}, {"blocks": [GPTQ]}), data=DATA)
    plan = plan_stages(job.model, job.stages, job.data, job.budget, None)
    result = compress_job(job, Watch())
    made = open_model(result.folder)
    assert result.nbytes == pytest.approx(plan.output_bytes, rel=0.02)
    assert len(made.described) == 2 * (4 + 3 * 3)
    assert all(not isinstance(made.weight(each), Dense) for each in made.described)
    assert plan.result is not None
    assert plan.result.described.keys() == made.described.keys()


def test_depth_may_come_before_and_after(tmp_path: Path) -> None:
    base = make(tmp_path, "qwen3_moe", num_hidden_layers=4)
    cut = {"shortgpt": {"num_dropped": 1}}
    result = reduce(base, tmp_path / "out", cut, {"reap": {"keep": 0.5}}, cut)
    made = AutoModelForCausalLM.from_pretrained(result.folder)
    assert (len(made.model.layers), made.config.num_local_experts) == (2, 3)


@BOTH
@MIXTURES
def test_a_killed_run_gives_the_same_bits(
    name: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make(tmp_path, name)
    given = {method: {"keep": 0.5}}
    first = reduce(base, tmp_path / "whole", given, data=FEW)
    for call in (1, 2):
        with monkeypatch.context() as patch:
            patch.setattr(_Streamer, "_save", crash_at(call, _Streamer._save))
            with pytest.raises(Crash):
                reduce(base, tmp_path / f"out{call}", given, data=FEW)
        again = reduce(base, tmp_path / f"out{call}", given, data=FEW)
        assert digests(again.folder) == digests(first.folder)
        assert again.starved == first.starved


def test_what_cannot_lose_experts_is_refused_while_planning(tmp_path: Path) -> None:
    def plan(name: str, *given: dict[str, Any], base: Path | None = None, **scopes: Any) -> None:
        folder = tmp_path / name
        base = base or (folder / "base" if (folder / "base").exists() else make_base(folder, name))
        job = make_job(base, folder / "out", **stages(*given), data=DATA, **scopes)
        plan_stages(job.model, job.stages, job.data, job.budget, None)

    with pytest.raises(ValueError, match="a llama block has no experts that could go"):
        plan("llama", {"reap": {}})
    with pytest.raises(
        ValueError, match=r"keep=0\.25 leaves 1 of 4 experts, and 2 answer each token; keep at least 0\.5"
    ):
        plan("mixtral", {"reap": {"keep": 0.25}})
    with pytest.raises(ValueError, match=r"keep=0\.99 takes out none of 4 experts"):
        plan("qwen3_moe", {"hc_smoe": {"keep": 0.99}})
    with pytest.raises(ValueError, match="reap changes which matrices there are; put it before"):
        plan("mixtral", {"blocks": [GPTQ]}, {"reap": {}})
    with pytest.raises(ValueError, match=r"needs about .* of memory to change the shapes of one block at a time"):
        plan("mixtral", {"reap": {}}, budget={"host": "1MiB"})
    with pytest.raises(RecipeError, match="keep must be above 0 and below 1"):
        parse_recipe({"stages": [{"reap": {"keep": 1.0}}]})
    with pytest.raises(RecipeError, match="works on the whole model"):
        parse_recipe({"stages": [{"blocks": [{"reap": {}}]}]})
    experts = {"linear": {"match": "moe.*", "rtn": {"bits": 4, "group_size": 8}}}
    small = compress_job(make_job(tmp_path / "mixtral" / "base", tmp_path / "w4", experts), Watch()).folder
    with pytest.raises(ValueError, match=r"w1\.weight is compressed already; take out experts first"):
        plan("mixtral", {"reap": {}}, base=small)


def test_compressed_attention_stays_as_it_is(tmp_path: Path) -> None:
    base = make(tmp_path, "qwen3_moe")
    attention = {"linear": {"match": "attn.*", "rtn": {"bits": 4, "group_size": 8}}}
    small = open_model(compress_job(make_job(base, tmp_path / "w4", attention), Watch()).folder)
    job = make_job(Path(small.source.label), tmp_path / "out", **stages({"reap": {}}))
    job = type(job)(
        job.model, job.stages, job.data.model_copy(update={"source": str(tmp_path / "text.txt")}), job.budget, job.out
    )
    made = open_model(compress_job(job, Watch()).folder)
    assert made.described == small.described
    assert made.num_parameters < small.num_parameters

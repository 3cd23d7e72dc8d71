"""Bridges: the right matrix is refitted to the right target, for every kind of gap; resumed, planned, and told of."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from decoct.engine.bridge import Bridging, bridges
from decoct.engine.compress import compress_job
from decoct.engine.data import Data, load_tokens
from decoct.engine.gaps import Gap, gaps_of
from decoct.engine.job import Watch
from decoct.engine.runner import Runner
from decoct.engine.shallow import ShallowModel
from decoct.engine.stages import plan_stages
from decoct.methods import Cut, Cuts
from decoct.methods.depth import whole
from decoct.methods.prune.blockpruner import BlockPruner
from decoct.model import open_model
from decoct.recipe import RecipeError, parse_recipe
from tests.engine.running import Crash, crash_at, digests, make_base, make_job
from tests.engine.test_rotate import predictions, some_tokens
from tests.reference.reduced_rank import full_map

TOKENS = torch.randint(3, 60, (4, 12), generator=torch.Generator().manual_seed(3))
SEVERAL = frozenset({Cut(1, "mlp"), Cut(3, "attn"), Cut(4)})


def make(folder: Path, name: str = "llama") -> Path:
    return make_base(folder, name, num_hidden_layers=5)


def stages(method: str, **settings: Any) -> dict[str, Any]:
    return {"stages": [{method: {"num_dropped": 1, **settings}}]}


def refitted(
    base: Path, cuts: Cuts, folder: Path, *, rank: int | None = None, in_memory: bool = True
) -> dict[str, torch.Tensor]:
    left, told = ShallowModel.of(open_model(base), cuts), list[str]()
    folder.mkdir(parents=True, exist_ok=True)
    todo = Bridging(left, TOKENS, torch.float32, rank, in_memory, folder, folder / "scratch", told.append)
    return {name: weight.unpack() for name, weight in bridges(todo).items()}


@pytest.mark.parametrize(
    ("cuts", "gaps"),
    [
        (whole([2]), [Gap(whole([2]), Cut(1, "mlp"), 3, halfway=False)]),
        (whole([2, 3]), [Gap(whole([2, 3]), Cut(1, "mlp"), 4, halfway=False)]),
        (whole([4]), [Gap(whole([4]), Cut(3, "mlp"), 5, halfway=False)]),
        (whole([0]), [Gap(whole([0]), None, 1, halfway=False)]),
        ({Cut(0, "attn")}, [Gap(frozenset({Cut(0, "attn")}), None, 0, halfway=True)]),
        ({Cut(2, "attn")}, [Gap(frozenset({Cut(2, "attn")}), Cut(1, "mlp"), 2, halfway=True)]),
        ({Cut(2, "mlp")}, [Gap(frozenset({Cut(2, "mlp")}), Cut(2, "attn"), 3, halfway=False)]),
        (
            {Cut(1, "mlp"), Cut(2), Cut(3, "attn")},
            [Gap(frozenset({Cut(1, "mlp"), Cut(2), Cut(3, "attn")}), Cut(1, "attn"), 3, halfway=True)],
        ),
        (
            {Cut(0), Cut(1, "attn"), Cut(2, "mlp")},
            [
                Gap(frozenset({Cut(0), Cut(1, "attn")}), None, 1, halfway=True),
                Gap(frozenset({Cut(2, "mlp")}), Cut(2, "attn"), 3, halfway=False),
            ],
        ),
    ],
)
def test_gaps(base: Path, tmp_path: Path, cuts: Any, gaps: list[Gap]) -> None:
    assert gaps_of(ShallowModel.of(open_model(make(tmp_path)), frozenset(cuts))) == gaps


def test_gaps_where_attention_and_mlp_read_the_same_states(tmp_path: Path) -> None:
    left = ShallowModel.of(open_model(make(tmp_path, "gpt_neox")), frozenset({Cut(1, "attn"), Cut(2, "mlp"), Cut(3)}))
    assert gaps_of(left) == [
        Gap(frozenset({Cut(1, "attn")}), Cut(1, "mlp"), 2, halfway=False),
        Gap(frozenset({Cut(2, "mlp"), Cut(3)}), Cut(2, "attn"), 4, halfway=False),
    ]


@pytest.mark.parametrize(
    ("cut", "matrix", "y", "t"),
    [
        (Cut(2), "model.layers.1.mlp.down_proj", "model.layers.2", "model.layers.3"),
        (Cut(4), "model.layers.3.mlp.down_proj", "model.layers.4", "model.norm"),
        (Cut(2, "attn"), "model.layers.1.mlp.down_proj", "model.layers.2", "model.layers.2.post_attention_layernorm"),
        (Cut(2, "mlp"), "model.layers.2.self_attn.o_proj", "model.layers.2.post_attention_layernorm", "model.layers.3"),
    ],
)
@torch.no_grad()
def test_the_matrix_before_a_gap_is_fitted_to_what_is_missing(
    cut: Cut, matrix: str, y: str, t: str, tmp_path: Path
) -> None:
    """By transformers' own model: `y` and `t` read the states before and behind the gap, `matrix` reads its inputs."""
    from transformers import AutoModelForCausalLM

    base = make(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    read: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        return lambda _, given: read.update({name: given[0].double().flatten(0, 1)})

    for name in (matrix, y, t):
        model.get_submodule(name).register_forward_pre_hook(keep(name))
    model(TOKENS)
    a = read[matrix]
    weight = 0.01 * float((a.T @ a).diagonal().mean())
    wanted = model.get_submodule(matrix).weight.double() + full_map(a, read[t] - read[y], weight)
    (found,) = refitted(base, frozenset({cut}), tmp_path / "out").values()
    torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("cuts", "share"),
    [(whole([2]), 0.85), (frozenset({Cut(2, "attn")}), 0.92), (frozenset({Cut(3, "mlp")}), 0.97), (SEVERAL, 0.9)],
)
def test_predictions_come_closer(
    cuts: Cuts, share: float, stories: Path, story_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On text that was not fitted, for a whole block, an attention, an MLP, and all of them."""
    monkeypatch.setattr(BlockPruner, "choose", lambda _, __: cuts)
    data = {"source": str(story_text), "num_sequences": 32, "sequence_length": 128}
    losses = []
    for number, bridge in enumerate((False, 32, True)):
        job = make_job(stories, tmp_path / f"out{number}", **stages("blockpruner", bridge=bridge), data=data)
        made = open_model(compress_job(job, Watch()).folder)
        tokens = load_tokens(Data(**{**data, "num_sequences": 40}), job.model, print)[32:]
        with torch.no_grad():
            wanted = predictions(job.model, tokens).double().log_softmax(-1)
            logp = predictions(made, tokens).double().log_softmax(-1)
        losses.append(float((wanted.exp() * (wanted - logp)).sum(-1).mean()))
    assert losses[2] < share * losses[0]
    assert losses[1] < losses[0]
    entry = made.lineage[-1]
    assert entry["not_bridged"] == []
    assert len(entry["bridged"]) == len(cuts)


@torch.no_grad()
def test_a_change_has_the_rank_that_was_asked_for(tmp_path: Path) -> None:
    base = make(tmp_path)
    name = "model.layers.1.mlp.down_proj.weight"
    before = open_model(base).weight(name).unpack().double()
    for rank in (1, 3):
        after = refitted(base, whole([2]), tmp_path / str(rank), rank=rank)[name].double()
        values = torch.linalg.svdvals(after - before)
        assert values[rank - 1] > 1e-3 * values[0]
        assert values[rank:].max() < 1e-5 * values[0]
    everything = refitted(base, whole([2]), tmp_path / "all", rank=32)
    torch.testing.assert_close(everything[name], refitted(base, whole([2]), tmp_path / "full")[name])


@torch.no_grad()
def test_a_low_rank_bridge_gives_a_plain_checkpoint(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base, told = make(tmp_path), list[str]()
    job = make_job(base, tmp_path / "out", **stages("angular", bridge=2))
    plain = plan_stages(job.model, make_job(base, tmp_path, **stages("angular")).stages, job.data, job.budget, None)
    plan = plan_stages(job.model, job.stages, job.data, job.budget, None)
    result = compress_job(job, Watch(message=told.append))
    assert result.nbytes == plan.output_bytes == plain.output_bytes
    assert "quantization_config" not in json.loads((result.folder / "config.json").read_text())
    made = open_model(result.folder)
    assert made.described == {}
    entry = made.lineage[-1]
    assert entry["stage"]["angular"]["bridge"] == 2
    (gap,) = entry["bridged"]
    assert gap["gap"] == entry["taken_out"]
    assert f"bridged {gap['gap'][0]}: {gap['refitted']} is refitted" in told
    found = AutoModelForCausalLM.from_pretrained(result.folder)(some_tokens()).logits
    torch.testing.assert_close(found, predictions(made, some_tokens()), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("cuts", "alone"), [(whole([0]), ["block 0"]), (frozenset({Cut(0, "attn")}), ["the attn of block 0"])]
)
def test_what_cannot_be_bridged_is_said(
    cuts: Cuts, alone: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, told = make(tmp_path), list[str]()
    monkeypatch.setattr(BlockPruner, "choose", lambda _, __: cuts)
    with_bridge = compress_job(
        make_job(base, tmp_path / "out", **stages("blockpruner", bridge=True)), Watch(message=told.append)
    )
    entry = open_model(with_bridge.folder).lineage[-1]
    assert entry["bridged"] == []
    assert entry["not_bridged"] == [{"gap": alone}]
    assert f"warning: {alone[0]} out without a bridge: nothing but the embedding is before it to refit" in told
    without = compress_job(make_job(base, tmp_path / "without", **stages("blockpruner")), Watch())
    shards = [{n: d for n, d in digests(r.folder).items() if n.startswith("model-")} for r in (with_bridge, without)]
    assert shards[0] == shards[1]


@torch.no_grad()
def test_states_in_files_give_the_same_matrices(tmp_path: Path) -> None:
    base = make(tmp_path)
    inside = refitted(base, SEVERAL, tmp_path / "inside")
    outside = refitted(base, SEVERAL, tmp_path / "outside", in_memory=False)
    assert inside.keys() == outside.keys()
    assert len(inside) == 3
    assert all(torch.equal(inside[name], outside[name]) for name in inside)
    assert not list((tmp_path / "outside/scratch").glob("*.bin")), "states that nothing needs any more are removed"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # files that the crash left open
@pytest.mark.parametrize("in_memory", [True, False])
def test_an_interrupted_bridge_goes_on_where_it_was(
    in_memory: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, calls = make(tmp_path), list[int]()
    expected = refitted(base, SEVERAL, tmp_path / "whole", in_memory=in_memory)
    run = Runner.run

    def counted(self: Runner, block: int, *given: Any) -> Any:
        calls.append(block)
        return run(self, block, *given)

    monkeypatch.setattr(Runner, "run", counted)
    refitted(base, SEVERAL, tmp_path / "counted", in_memory=in_memory)
    most = len(calls)
    for at in range(0, most, 2):
        folder = tmp_path / f"out{at}"
        with monkeypatch.context() as patch:
            patch.setattr(Runner, "run", crash_at(at, run))
            with pytest.raises(Crash):
                refitted(base, SEVERAL, folder, in_memory=in_memory)
        calls.clear()
        found = refitted(base, SEVERAL, folder, in_memory=in_memory)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert len(calls) <= most - at + 5, "all but the block that it was at is not done again"
    calls.clear()
    refitted(base, SEVERAL, tmp_path / "counted", in_memory=in_memory)
    assert not calls, "what was found is not looked for again"


def test_a_rank_of_one_is_not_true(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Runner, "run", crash_at(12, Runner.run))
        with pytest.raises(Crash):
            compress_job(make_job(base, tmp_path / "out", **stages("shortgpt", bridge=True)), Watch())
    with pytest.raises(ValueError, match="holds an unfinished run with another stage"):
        compress_job(make_job(base, tmp_path / "out", **stages("shortgpt", bridge=1)), Watch())


def test_a_plan_counts_the_bridge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("decoct.engine.plan_depth.product_rate", lambda _: 1e11)
    monkeypatch.setattr("decoct.engine.plan_bridge.product_rate", lambda _: 1e11)
    base = make(tmp_path)

    def plan(num_sequences: int = 4, **settings: Any) -> Any:
        data = {"num_sequences": num_sequences, "sequence_length": 16}
        job = make_job(base, tmp_path / "out", **stages("sleb", num_sequences=1, **settings), data=data)
        return plan_stages(job.model, job.stages, job.data, job.budget, None).stages[0]

    plain, short, long = plan(), plan(bridge=True), plan(100_000, bridge=True)
    forward = 2.0 * short.num_parameters / 0.8 * 64 / 4e10  # a run of the text through what is left
    assert short.seconds - plain.seconds > 2 * forward
    states = 100_000 * 16 * 32 * 4
    assert long.peak_bytes - plan(100_000).peak_bytes > 2 * states
    assert long.scratch_bytes == 4 * states
    assert (plain.scratch_bytes, plain.in_memory, long.in_memory) == (0, True, True)
    monkeypatch.setattr("decoct.engine.budget.Budget.host_limit", lambda _: short.peak_bytes + states)
    tight = plan(100_000, bridge=True)
    assert not tight.in_memory
    assert tight.peak_bytes < short.peak_bytes + states


def test_a_bridge_that_cannot_be_is_refused(tmp_path: Path) -> None:
    for value in (0, -3):
        with pytest.raises(RecipeError, match="bridge must be true, false or a rank of at least 1"):
            parse_recipe(stages("sleb", bridge=value))
    with pytest.raises(RecipeError, match="bridge"):
        parse_recipe(stages("sleb", bridge="yes"))
    job = make_job(make(tmp_path), tmp_path / "out", **stages("sleb", bridge=33))
    with pytest.raises(ValueError, match="bridge is 33, and a matrix that it would change has rank 32 at most"):
        plan_stages(job.model, job.stages, job.data, job.budget, None)

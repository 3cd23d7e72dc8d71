"""Taking blocks out: what is left is what transformers would make of the same blocks, and is chosen by true losses."""

import json
from collections.abc import Sequence
from itertools import combinations
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch

from decoct.engine import probe as probing
from decoct.engine.compress import compress_job
from decoct.engine.data import Data, load_tokens
from decoct.engine.job import Watch
from decoct.engine.probe import ModelProbe
from decoct.engine.shallow import ShallowModel
from decoct.engine.stages import plan_stages
from decoct.methods import Cut, Cuts
from decoct.methods.depth import DepthMethod, Part, whole
from decoct.methods.prune.blockpruner import BlockPruner
from decoct.methods.prune.evopress import EvoPress
from decoct.methods.prune.sleb import SLEB
from decoct.model import open_model
from decoct.recipe import RecipeError, parse_recipe
from decoct.weights import Dense, Sparse
from tests.engine.running import GPTQ, Crash, crash_at, digests, make_base, make_job
from tests.engine.test_rotate import predictions, some_tokens
from tests.tiny import CONFIGS, save_model

BLOCKS = {"num_hidden_layers": 5, "n_layer": 5}


def stages(*given: dict[str, Any]) -> dict[str, Any]:
    return {"stages": list(given)}


def make(folder: Path, name: str = "llama") -> Path:
    key = "n_layer" if name == "gpt2" else "num_hidden_layers"
    return make_base(folder, name, **{key: BLOCKS[key]})


def tokens_and_probe(base: Path, at_once: int = 3) -> tuple[torch.Tensor, ModelProbe]:
    tokens = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(3))
    return tokens, ModelProbe(open_model(base), tokens, torch.float32, at_once)


def reference_without(base: Path, cuts: Cuts, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of transformers' own model with blocks skipped, and sublayers' outputs made zero, by hand."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base).eval()
    for cut in cuts:
        layer = model.model.layers[cut.block]
        if cut.part in ("block", "attn"):
            layer.self_attn.o_proj.weight.data.zero_()
        if cut.part in ("block", "mlp"):
            layer.mlp.down_proj.weight.data.zero_()
    with torch.no_grad():
        return torch.as_tensor(model(tokens).logits)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_every_family_without_two_blocks_is_what_skipping_them_gives(name: str, tmp_path: Path) -> None:
    key = "n_layer" if name == "gpt2" else "num_hidden_layers"
    reference = save_model(name, tmp_path, **{key: 5})
    model = ShallowModel.of(open_model(tmp_path), whole([1, 3]))
    blocks = reference.get_submodule(model.family.blocks)
    for block in (1, 3):  # a block that gives back what it is given
        blocks[block].forward = lambda hidden, *_, **__: hidden
    assert model.num_blocks == 3
    torch.testing.assert_close(predictions(model, some_tokens()), reference(some_tokens()).logits, rtol=1e-3, atol=1e-4)


def test_blocks_keep_their_own_sliding_windows(tmp_path: Path) -> None:
    """Gemma 3 looks back far in every sixth block only, by its number: that must travel with the block."""
    save_model("gemma3_text", tmp_path, num_hidden_layers=7)
    base = open_model(tmp_path)
    before = base.config["layer_types"]
    assert len(set(before)) == 2
    left = ShallowModel.of(base, whole([0, 2]))
    assert left.config["layer_types"] == [before[block] for block in (1, 3, 4, 5, 6)]


@pytest.mark.parametrize("part", ["attn", "mlp"])
@torch.no_grad()
def test_a_block_without_its_attention_or_mlp_stores_nothing_of_it(part: Part, tmp_path: Path) -> None:
    base = make(tmp_path)
    model = ShallowModel.of(open_model(base), frozenset({Cut(2, part), Cut(4)}))
    wanted = reference_without(base, model.cuts, some_tokens())
    torch.testing.assert_close(predictions(model, some_tokens()), wanted, rtol=1e-3, atol=1e-4)
    name = {"attn": "self_attn.q_proj.weight", "mlp": "mlp.gate_proj.weight"}[part]
    weight = model.weight(f"model.layers.2.{name}")
    assert isinstance(weight, Sparse)
    assert weight.values.numel() == 0
    assert isinstance(model.weight(f"model.layers.1.{name}"), Dense)


def test_losses_are_the_divergences_of_the_model_without_the_blocks(tmp_path: Path) -> None:
    base = make(tmp_path)
    tokens, probe = tokens_and_probe(base)
    parts = frozenset({Cut(2, "attn")}), frozenset({Cut(2, "mlp"), Cut(0)})
    candidates: list[Cuts] = [whole([0]), whole([4]), whole([1, 3]), *parts, whole([])]
    base_logp = reference_without(base, whole([]), tokens).double().log_softmax(-1)
    for cuts, loss in zip(candidates, probe.losses(candidates), strict=True):
        logp = reference_without(base, cuts, tokens).double().log_softmax(-1)
        wanted = (base_logp.exp() * (base_logp - logp)).sum(-1).mean()
        assert loss == pytest.approx(float(wanted), rel=1e-3, abs=1e-6)


def test_influences_and_angles_follow_the_formulas(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base = make(tmp_path)
    tokens, probe = tokens_and_probe(base)
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    states: list[torch.Tensor] = []
    hooks = [layer.register_forward_pre_hook(lambda _, given: states.append(given[0])) for layer in model.model.layers]
    hooks.append(model.model.norm.register_forward_pre_hook(lambda _, given: states.append(given[0])))
    with torch.no_grad():
        model(tokens)

    def cosines(first: int, span: int) -> torch.Tensor:
        x, y = states[first].double(), states[first + span].double()
        return (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))

    with torch.no_grad():
        influences, angles = probe.influences(), probe.angles(2)
    assert influences == pytest.approx([float(1 - cosines(block, 1).mean()) for block in range(5)], abs=1e-5)
    assert angles == pytest.approx([float(cosines(b, 2).arccos().mean()) / torch.pi for b in range(4)], abs=1e-4)


METHODS_OF_DEPTH = [
    {"shortgpt": {"num_dropped": 2}},
    {"angular": {"num_dropped": 2}},
    {"sleb": {"num_dropped": 2}},
    {"blockpruner": {"num_dropped": 2}},
    {"evopress": {"num_dropped": 2, "generations": 2, "offspring": 4}},
]


@pytest.mark.parametrize("stage", METHODS_OF_DEPTH, ids=lambda stage: next(iter(stage)))
@torch.no_grad()
def test_a_stage_gives_a_checkpoint_that_transformers_loads(stage: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    import decoct.hf

    base = make(tmp_path)
    job = make_job(base, tmp_path / "out", **stages(stage))
    plan = plan_stages(job.model, job.stages, job.data, job.budget, None)
    result = compress_job(job, Watch())
    made = open_model(result.folder)
    assert decoct.hf
    taken = made.lineage[-1]["taken_out"]
    assert len(taken) >= 2
    if "blockpruner" not in stage:
        assert made.num_blocks == 3
        assert result.nbytes == plan.output_bytes
    found = AutoModelForCausalLM.from_pretrained(result.folder)(some_tokens()).logits
    torch.testing.assert_close(found, predictions(made, some_tokens()), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found, reference_without(base, _cuts(taken), some_tokens()), rtol=1e-3, atol=1e-4)


def _cuts(taken: list[str]) -> Cuts:
    """What the lineage says, read back."""
    found = set()
    for text in taken:
        words = text.split()
        found.add(Cut(int(words[-1]), {"the": words[1]}.get(words[0], "block")))  # type: ignore[arg-type]
    return frozenset(found)


def loss_of(base: Path, cuts: Cuts) -> float:
    _, probe = tokens_and_probe(base)
    with torch.no_grad():
        return probe.losses([cuts])[0]


@torch.no_grad()
def test_sleb_takes_the_best_block_each_round(tmp_path: Path) -> None:
    base = make(tmp_path)
    _, probe = tokens_and_probe(base)
    chosen = SLEB(num_dropped=2).choose(probe)
    first = min((whole([b]) for b in range(5)), key=lambda cuts: loss_of(base, cuts))
    best = min((first | {Cut(b)} for b in range(5) if Cut(b) not in first), key=lambda cuts: loss_of(base, cuts))
    assert chosen == best


@torch.no_grad()
def test_candidates_side_by_side_are_measured_as_alone(tmp_path: Path) -> None:
    base = make(tmp_path)
    candidates = [whole([b]) for b in range(5)]
    together = tokens_and_probe(base, at_once=5)[1].losses(candidates)
    assert together == tokens_and_probe(base, at_once=1)[1].losses(candidates)


SEARCHES: list[DepthMethod] = [SLEB(num_dropped=1), BlockPruner(num_dropped=1), EvoPress(num_dropped=1, generations=2)]


@pytest.mark.parametrize("method", SEARCHES, ids=lambda method: type(method).__name__)
@torch.no_grad()
def test_what_is_not_finite_is_never_the_best(
    method: DepthMethod, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, probe = tokens_and_probe(make(tmp_path))
    asked: list[int] = []

    def measured(_: ModelProbe, finals: list[torch.Tensor]) -> list[float]:
        asked.extend(range(len(finals)))
        return [torch.nan if len(asked) <= 3 else 1.0 for _ in finals]

    monkeypatch.setattr(ModelProbe, "_divergences", measured)
    chosen = method.choose(probe)
    assert len(chosen) >= 1
    assert probe.losses([chosen]) == [1.0]
    assert sorted(set(probe.known.values())) == [1.0, torch.inf]
    _, probe = tokens_and_probe(tmp_path / "base")
    monkeypatch.setattr(ModelProbe, "_divergences", lambda _, finals: [torch.nan] * len(finals))
    with pytest.raises(ValueError, match=r"\Awhatever goes next, the predictions are not finite; take out[^\n]*\Z"):
        method.choose(probe)


@torch.no_grad()
def test_no_more_tokens_are_compared_than_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "_MOST_COMPARED", 13)
    compared: list[int] = []
    logits = ModelProbe._logits

    def counting(self: ModelProbe, states: torch.Tensor, some: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        compared.extend(some.tolist())
        return logits(self, states, some, head)

    monkeypatch.setattr(ModelProbe, "_logits", counting)
    _, probe = tokens_and_probe(make(tmp_path))
    probe.losses([whole([1])])
    assert compared[: len(compared) // 2] == list(range(0, 24, 2))


class Pairs:
    """A probe of five blocks that are missed by pairs: those missed least one by one are missed most together."""

    num_blocks = 5
    num_sequences = 1

    def __init__(self) -> None:
        self.pairs = [whole(pair) for pair in combinations(range(5), 2)]

    def share(self, cut: Cut) -> float:
        raise AssertionError(cut)

    def influences(self) -> list[float]:
        raise AssertionError

    def angles(self, span: int) -> list[float]:
        raise AssertionError(span)

    def losses(self, candidates: Sequence[Cuts], num_sequences: int | None = None) -> list[float]:
        """Of a pair, less the later it comes; alone, less the earlier."""
        return [float(next(iter(cuts)).block if len(cuts) == 1 else 9 - self.pairs.index(cuts)) for cuts in candidates]


@pytest.mark.parametrize("seed", range(4))
def test_evolution_finds_the_best_set_from_a_bad_beginning(seed: int) -> None:
    probe = Pairs()
    start = whole([0, 1])
    assert probe.losses([start]) == [max(probe.losses(probe.pairs))]
    chosen = EvoPress(num_dropped=2, generations=6, offspring=4, seed=seed).choose(probe)
    assert chosen == min(probe.pairs, key=lambda cuts: probe.losses([cuts])) == whole([3, 4])


def test_offspring_are_judged_on_more_and_more_text(tmp_path: Path) -> None:
    """Eight on a quarter of it, the best two on everything; the first parent is measured with them."""
    from decoct.methods.prune.evopress import EvoPress

    base = make(tmp_path)
    tokens = torch.randint(3, 60, (8, 12), generator=torch.Generator().manual_seed(3))
    asked: list[tuple[int, int]] = []

    class Asked(ModelProbe):
        def losses(self, candidates: Sequence[Cuts], num_sequences: int | None = None) -> list[float]:
            asked.append((len(candidates), num_sequences or self.num_sequences))
            return super().losses(candidates, num_sequences)

    def choose(**settings: Any) -> Cuts:
        with torch.no_grad():
            probe = Asked(open_model(base), tokens, torch.float32, 3)
            return EvoPress(num_dropped=2, generations=2, **settings).choose(probe)

    first = choose(offspring=8)
    assert asked == [(5, 8), (8, 2), (3, 8), (8, 2), (2, 8)]
    assert choose(offspring=8) == first
    assert choose(offspring=1, seed=4)
    assert asked[10:] == [(5, 8), (2, 8), (1, 8)], "a single child needs no elimination"


@torch.no_grad()
def test_losses_on_the_first_sequences_are_those_of_a_shorter_text(tmp_path: Path) -> None:
    base = make(tmp_path)
    tokens, probe = tokens_and_probe(base)
    short = ModelProbe(open_model(base), tokens[:1], torch.float32, 3)
    candidates = [whole([1]), whole([2, 4])]
    assert probe.losses(candidates, 1) == pytest.approx(short.losses(candidates), rel=1e-4)
    assert probe.losses(candidates, 1) != pytest.approx(probe.losses(candidates), rel=1e-4)


def test_an_interrupted_evolution_ends_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make(tmp_path)
    stage = stages({"evopress": {"num_dropped": 2, "generations": 2, "offspring": 8, "num_sequences": 4}})
    whole_run = digests(compress_job(make_job(base, tmp_path / "whole", **stage), Watch()).folder)
    measure = ModelProbe._divergences
    for call in (1, 2):
        with monkeypatch.context() as patch:
            patch.setattr(ModelProbe, "_divergences", crash_at(call, measure))
            with pytest.raises(Crash):
                compress_job(make_job(base, tmp_path / "out", **stage), Watch())
    lines = (tmp_path / "out/.run/stage-0/losses.jsonl").read_text().splitlines()
    assert [json.loads(line)["sequences"] for line in lines] == [4] * 5 + [1] * 8 + [4] * 3
    assert digests(compress_job(make_job(base, tmp_path / "out", **stage), Watch()).folder) == whole_run


def test_a_bridge_makes_up_for_much_of_a_gap(stories: Path, story_text: Path, tmp_path: Path) -> None:
    losses = []
    for bridge in (False, True):
        data = {"source": str(story_text), "num_sequences": 32, "sequence_length": 128}
        stage = {"sleb": {"num_dropped": 2, "bridge": bridge}}
        job = make_job(stories, tmp_path / f"out{bridge}", **stages(stage), data=data)
        made = open_model(compress_job(job, Watch()).folder)
        tokens = load_tokens(Data(**{**data, "num_sequences": 40}), job.model, print)[32:]
        with torch.no_grad():
            wanted = predictions(job.model, tokens).double().log_softmax(-1)
            logp = predictions(made, tokens).double().log_softmax(-1)
        losses.append(float((wanted.exp() * (wanted - logp)).sum(-1).mean()))
    assert losses[1] < 0.9 * losses[0]


@pytest.mark.parametrize(
    ("stage", "gone"),
    [
        ({"distilbert": {"keep": 0.25}}, 6),
        ({"distilbert": {"num_dropped": 3}}, 3),
        ({"sleb": {"num_dropped": 2}}, 2),
        ({"blockpruner": {"num_dropped": 2}}, 2),
    ],
)
def test_the_plan_counts_the_blocks_that_go(stage: dict[str, Any], gone: int, tmp_path: Path) -> None:
    base = make_base(tmp_path, num_hidden_layers=8)
    job = make_job(base, tmp_path / "out", **stages(stage))
    (plan,) = plan_stages(job.model, job.stages, job.data, job.budget, None).stages
    (group,) = plan.groups
    assert (group.role, group.count) == ("blocks", gone)
    slots = [job.model.prefix(0) + slot.name for slot in job.model.block_slots]
    assert group.parameters == gone * sum(prod(job.model.shape(name)) for name in slots)


def test_what_was_measured_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make(tmp_path)
    stage = stages({"sleb": {"num_dropped": 3}})
    whole_run = digests(compress_job(make_job(base, tmp_path / "whole", **stage), Watch()).folder)
    measure = ModelProbe._divergences
    with monkeypatch.context() as patch:
        patch.setattr(ModelProbe, "_divergences", crash_at(2, measure))
        with pytest.raises(Crash):
            compress_job(make_job(base, tmp_path / "out", **stage), Watch())
    file = tmp_path / "out/.run/stage-0/losses.jsonl"
    before = file.read_text().splitlines()
    assert len(before) == 5 + 4
    file.write_text(file.read_text() + '{"cuts": [[0, "blo')  # what a power cut leaves of a line
    result = compress_job(make_job(base, tmp_path / "out", **stage), Watch())
    assert digests(result.folder) == whole_run


def test_cuts_before_quantization_in_one_recipe(tmp_path: Path) -> None:
    base = make(tmp_path)
    both = stages({"blockpruner": {"num_dropped": 2}}, {"blocks": [GPTQ]})
    made = open_model(compress_job(make_job(base, tmp_path / "out", **both), Watch()).folder)
    alone = open_model(compress_job(make_job(base, tmp_path / "alone", **stages(both["stages"][0])), Watch()).folder)
    assert made.num_blocks == alone.num_blocks
    empty = {name for name, each in alone.described.items() if each["kind"] == "Sparse"}
    for name, description in made.described.items():
        assert (description["kind"] == "Sparse") == (name in empty), "what was taken out stays out"


def test_what_cannot_be_cut_is_refused_while_planning(tmp_path: Path) -> None:
    base = make(tmp_path)

    def plan(*given: dict[str, Any], model: Path = base) -> None:
        job = make_job(model, tmp_path / "out", **stages(*given))
        plan_stages(job.model, job.stages, job.data, job.budget, None)

    with pytest.raises(ValueError, match="num_dropped is 5, and the model has 5 blocks"):
        plan({"sleb": {"num_dropped": 5}})
    with pytest.raises(ValueError, match="put it before the stages that compress"):
        plan({"blocks": [GPTQ]}, {"sleb": {"num_dropped": 1}})
    with pytest.raises(ValueError, match="e2e_qp has nothing to tune"):
        plan({"shortgpt": {"num_dropped": 1}}, {"e2e_qp": {}})
    gpt2 = make_base(tmp_path / "gpt2", "gpt2", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(ValueError, match="scales attention by each block's number"):
        plan({"shortgpt": {"num_dropped": 1}}, model=gpt2)
    gemma = make_base(tmp_path / "gemma", "gemma2")
    with pytest.raises(ValueError, match="a norm stands between a gemma2 block's MLP"):
        plan({"shortgpt": {"num_dropped": 1, "bridge": True}}, model=gemma)
    with pytest.raises(RecipeError, match="num_dropped must be at least 1"):
        parse_recipe({"stages": [{"sleb": {"num_dropped": 0}}]})
    with pytest.raises(RecipeError, match="works on the whole model"):
        parse_recipe({"stages": [{"blocks": [{"sleb": {}}]}]})
    assert json.dumps(make_job(base, tmp_path / "o", **stages({"sleb": {}})).stages[0].description)


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("ziplm", {"ziplm": {"keep": 0.8, "multiple_of": 4}}),
        ("slicegpt", {"slicegpt": {"keep": 0.7}}),
        ("quarot", {"blocks": [{"quarot": {}}, GPTQ]}),
        ("smoothquant", {"blocks": [{"smoothquant": {}}, GPTQ]}),
    ],
)
def test_what_needs_whole_blocks_is_refused_before_the_search(tmp_path: Path, name: str, stage: dict[str, Any]) -> None:
    job = make_job(make(tmp_path), tmp_path / "out", **stages({"blockpruner": {"num_dropped": 1}}, stage))
    with pytest.raises(ValueError, match=f"was taken out of its block, or may be, and {name} needs whole blocks"):
        plan_stages(job.model, job.stages, job.data, job.budget, None)

"""Guided statistics from end to end: token weights are true gradients, they are found once, and they help."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import decoct
from decoct.engine import find_guidance as finding
from decoct.engine.activations import Activations
from decoct.engine.find_guidance import Finding, find_guidance
from decoct.engine.guidance import Layout, layout
from decoct.engine.job import Watch
from decoct.engine.rules import Rule, assign
from decoct.engine.stages import plan_stages
from decoct.methods.guided import GroupedMoments, Guided
from decoct.methods.quantize.gptq import GPTQ
from decoct.model import open_model
from decoct.recipe import RecipeError, method_settings, parse_recipe, with_settings
from tests.engine.running import Crash, Settings, crash_at, digests, make_base, make_job, run, whole
from tests.reference import guided as reference

GUIDED: Settings = {"linear": {"gptq": {"bits": 4, "group_size": 8, "guided": 4}}}
GPTAQ: Settings = {"linear": {"gptaq": {"bits": 4, "group_size": 8, "guided": 2}}}
TOKENS = torch.randint(3, 60, (4, 16), generator=torch.Generator().manual_seed(1))


def plan_of(base: Path, *blocks: Settings) -> Any:
    job = make_job(base, base.parent / "nowhere", *blocks)
    return plan_stages(job.model, job.stages, job.data, job.budget, None).stages[0]


def brute_force(folder: Path, groups: int) -> dict[str, torch.Tensor]:
    """Token weights [tokens, groups] of every linear layer, from one backward through transformers' whole model."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    outputs: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_: Any, __: Any, output: torch.Tensor) -> None:
            output.retain_grad()
            outputs[name] = output

        return hook

    for name, module in model.named_modules():
        if hasattr(module, "weight") and module.weight.ndim == 2:
            module.register_forward_hook(keep(name))
    found: dict[str, list[list[float]]] = {}
    for row, sequence in enumerate(TOKENS):
        logits = model(sequence[None]).logits[0]
        generator = torch.Generator().manual_seed(row)
        labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()  # type: ignore[no-untyped-call]
        for name, output in outputs.items():
            assert output.grad is not None
            found.setdefault(name, []).extend(reference.token_weights(output.grad[0], groups))
    return {name: torch.tensor(weights) for name, weights in found.items()}


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "phi3"])
def test_weights_are_those_of_whole_gradients(name: str, tmp_path: Path) -> None:
    base = make_base(tmp_path, name)
    model = open_model(base)
    rule = Rule(method=Guided(method=GPTQ(group_size=8), groups=4))
    found = layout(model, (assign(model, (rule,)),))
    assert found is not None
    guidance = find_guidance(Finding(model, found, TOKENS, torch.float32, tmp_path, lambda _: None))
    expected = brute_force(base, 4)
    compared = 0
    for block in range(model.num_blocks):
        for start, stop in ((0, 3), (3, 4)):
            for slot, weights in guidance.read(block, start, stop).items():
                path = model.family.module_name(model.prefix(block) + slot).removesuffix(".weight")
                wanted = next(value for key, value in expected.items() if key.endswith(path))
                torch.testing.assert_close(weights, wanted[16 * start : 16 * stop], rtol=2e-3, atol=1e-9)
                compared += 1
    assert compared == 2 * model.num_blocks * len(model.block_slots)


def test_each_method_gets_the_weighted_statistic_of_its_slot(base: Path, tmp_path: Path) -> None:
    """Through the whole engine: q, k and v read the same inputs, and each has groups of its own."""
    seen: list[GroupedMoments] = []
    original = Guided.compress

    def compress(self: Guided, weight: Any, stat: GroupedMoments) -> Any:
        seen.append(stat)
        return original(self, weight, stat)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Guided, "compress", compress)
        run(base, tmp_path / "out", GUIDED)
    found = [stat for stat in seen if stat.num_tokens == 64][-21:]
    masses = {tuple(stat.mass.tolist()) for stat in found}
    assert len(masses) == 21
    assert all(mass > 0 for each in masses for mass in each)


@pytest.mark.parametrize("blocks", [[GUIDED], [GPTAQ]])
def test_the_result_is_packed_and_another_than_without(blocks: list[Settings], base: Path, tmp_path: Path) -> None:
    made = open_model(run(base, tmp_path / "out", *blocks).folder)
    assert {description["kind"] for description in made.described.values()} == {"GroupInt"}
    ((name, settings),) = blocks[0]["linear"].items()
    plain = {"linear": {name: {key: value for key, value in settings.items() if key != "guided"}}}
    other = open_model(run(base, tmp_path / "plain", plain).folder)
    assert made.nbytes == other.nbytes
    changed = sum(not torch.equal(made.weight(n).unpack(), other.weight(n).unpack()) for n in made.described)
    assert changed == len(made.described)


def test_it_composes_with_rescaling_rotating_and_pruning(base: Path, tmp_path: Path) -> None:
    wanda: Settings = {"linear": {"wanda": {"sparsity": 0.5}}}
    awq: Settings = {"awq": {"bits": 4, "group_size": 8}}
    for number, blocks in enumerate(([awq, GUIDED], [{"quarot": {}}, GUIDED], [wanda, GUIDED])):
        assert run(base, tmp_path / f"out-{number}", *blocks).bits_per_weight > 0


# Interruptions


@contextmanager
def counting() -> Iterator[list[int]]:
    """The blocks whose weights are found while the body runs."""
    found: list[int] = []
    original = finding._find_block

    def counted(sweep: Any, guidance: Any, block: int) -> None:
        found.append(block)
        original(sweep, guidance, block)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finding, "_find_block", counted)
        yield found


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # files that the crash left open
@pytest.mark.parametrize("commit", range(0, 15, 2))
@pytest.mark.parametrize("after", [False, True])
def test_a_sweep_goes_on_where_it_was(commit: int, after: bool, base: Path, tmp_path: Path) -> None:
    """Commits: 4 of hidden states, then gradients and weights in turns, then the pass's own."""
    expected = whole(base, GUIDED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Activations, "commit", crash_at(commit, Activations.commit, after=after))
        with pytest.raises(Crash):
            run(base, tmp_path / "out", GUIDED)
    with counting() as first:
        result = run(base, tmp_path / "out", GUIDED)
    assert digests(result.folder) == expected
    assert first == [block for block in (2, 1, 0) if block in first]
    assert not list(tmp_path.rglob("*.bin"))


def test_a_pass_that_goes_on_finds_nothing_again(base: Path, tmp_path: Path) -> None:
    def event(found: Any) -> None:
        if found.part == "block 1":
            raise Crash

    with counting() as first, pytest.raises(Crash):
        run(base, tmp_path / "out", GUIDED, watch=Watch(event=event))
    assert first == [2, 1, 0]
    expected = whole(base, GUIDED)
    with counting() as again:
        assert digests(run(base, tmp_path / "out", GUIDED).folder) == expected
    assert again == []


def test_gradients_go_no_further_back_than_needed(base: Path, tmp_path: Path) -> None:
    rules = [{"match": "2.*", **GUIDED["linear"]}, {"match": "*", "gptq": {"group_size": 8}}]
    events: list[str] = []
    with counting() as found:
        run(base, tmp_path / "out", {"linear": rules}, watch=Watch(event=lambda event: events.append(event.part)))
    assert found == [2]
    assert events[:2] == ["gradients, lm_head", "gradients, block 2"]


# Planning


def test_disk_and_time_are_planned(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = plan_of(base, {"linear": {"gptq": {"bits": 4, "group_size": 8}}})
    guided = plan_of(base, GUIDED)
    assert guided.seconds > plain.seconds
    assert guided.output_bytes == plain.output_bytes
    most = 0
    commit = Activations.commit

    def measured(self: Activations, block: int) -> None:
        nonlocal most
        commit(self, block)
        most = max(most, sum(path.stat().st_size for path in tmp_path.rglob("*.bin")))

    monkeypatch.setattr(Activations, "commit", measured)
    run(base, tmp_path / "out", GUIDED)
    assert 0.7 * guided.scratch_bytes < most <= guided.scratch_bytes


def test_memory_is_planned(base: Path) -> None:
    """Four Gram matrices for each slot, in place of one for each edge."""
    more = plan_of(base, GUIDED).peak_bytes - plan_of(base, {"linear": {"gptq": {"group_size": 8}}}).peak_bytes
    assert more > 4 * 4 * (6 * 32**2 + 48**2) - 4 * (3 * 32**2 + 48**2)


def test_refusals(base: Path, tmp_path: Path) -> None:
    moe = make_base(tmp_path, "mixtral")
    with pytest.raises(ValueError, match=r"experts.*; give moe\.\w+ a rule of its own without it"):
        plan_of(moe, GUIDED)
    attention = {"linear": [{"match": "attn.*", **GUIDED["linear"]}, {"match": "*", "gptq": {"group_size": 8}}]}
    assert run(moe, tmp_path / "out", attention).bits_per_weight < 32
    with pytest.raises(ValueError, match="lm_head a rule of its own without it"):
        plan_of(base, {"linear": {"match": ["*", "lm_head"], **GUIDED["linear"]}})
    again = {"linear": {"gptq": {"bits": 8, "group_size": 8, "guided": 2}}}
    with pytest.raises(ValueError, match=r"without losing its structure|the same number in every step"):
        plan_of(base, GUIDED, again)
    with pytest.raises(ValueError, match="64 groups need as many output features, not 32"):
        plan_of(base, {"linear": {"gptq": {"group_size": 8, "guided": 64}}})
    for method, message in {
        "rtn": "guided weighs tokens in a Gram matrix",
        "eora": "it is for methods that quantize a matrix",
    }.items():
        with pytest.raises(RecipeError, match=message):
            plan_of(base, {"linear": {method: {"guided": 4}}})


def test_a_recipe_says_it_as_a_setting_of_the_method() -> None:
    value = {"stages": [{"blocks": [{"linear": {"gptq": {"group_size": 8}}}]}]}
    (stage,) = parse_recipe(with_settings(value, ["gptq.guided=4"])).stages
    (rule,) = stage.steps[0]  # type: ignore[union-attr]
    assert rule.method == Guided(method=GPTQ(group_size=8), groups=4)
    assert method_settings(rule.method)["gptq"]["guided"] == 4
    assert parse_recipe({"stages": [stage.description]}).stages[0] == stage
    for off in (0, None):
        (plain,) = parse_recipe(with_settings(value, [f"gptq.guided={'null' if off is None else off}"])).stages
        assert plain.steps[0][0].method == GPTQ(group_size=8)  # type: ignore[index]


def test_the_layout_is_by_block(base: Path) -> None:
    model = open_model(base)
    rule = Rule(("2.attn.q",), Guided(method=GPTQ(group_size=8), groups=3))
    found = layout(model, (assign(model, (rule,)),))
    assert found == Layout(({}, {}, {"self_attn.q_proj.weight": 3}))
    assert (found.first, found.columns) == (2, 3)
    assert layout(model, (assign(model, (Rule(method=GPTQ()),)),)) is None


# Does it help?


@pytest.mark.e2e
def test_it_brings_a_real_model_closer_to_itself(stories: Path, story_text: Path, tmp_path: Path) -> None:
    """KL to the uncompressed model on text that calibration has not seen. With a quarter of the tokens it is a draw."""
    text = story_text.read_text(encoding="utf-8")
    (tmp_path / "seen.txt").write_text(text[200_000:], encoding="utf-8")
    (tmp_path / "unseen.txt").write_text(text[:60_000], encoding="utf-8")
    divergence = {}
    for groups in (0, 4):
        recipe = {
            "data": {"source": str(tmp_path / "seen.txt"), "num_sequences": 256, "sequence_length": 256},
            "stages": [{"blocks": [{"linear": {"gptq": {"bits": 4, "group_size": "channel", "guided": groups}}}]}],
        }
        out = decoct.compress(stories, recipe, tmp_path / f"out-{groups}").folder
        found = decoct.evaluate(out, text=str(tmp_path / "unseen.txt"), against=stories, windows=48, length=256)
        assert found.kl_mean is not None
        divergence[groups] = found.kl_mean
    assert divergence[4] < 0.98 * divergence[0]

"""Norms' gains refitted at the end of a list of steps: only they change, outputs come nearer, refusals say where."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import decoct
from decoct.engine import stream
from decoct.engine.gains import each_gain, normed
from decoct.methods.heal.norm_tweaking import NormTweaking
from decoct.model import Model, open_model
from decoct.stats import PairedGram
from decoct.weights import Dense
from tests.contract.test_edge_scalings import readers
from tests.engine.running import GPTQ, RTN, WANDA, Crash, Settings, crash_at, digests, make_base, run
from tests.engine.test_folding import loaded
from tests.reference.inputs import correlated, gaussian

TWEAK: Settings = {"norm_tweaking": {}}
FAMILIES = ["llama", "qwen2", "gemma3_text", "gpt2", "opt"]


def gains(model: Model) -> dict[str, torch.Tensor]:
    return {name: model.tensor(name) for block in range(model.num_blocks) for name in model.others(block)}


@pytest.mark.parametrize("name", FAMILIES)
def test_only_the_norms_that_are_read_change(name: str, tmp_path: Path) -> None:
    base = make_base(tmp_path, name)
    plain = open_model(run(base, tmp_path / "plain", WANDA).folder)
    tweaked = open_model(run(base, tmp_path / "tweaked", WANDA, TWEAK).folder)
    for slot in tweaked.slots():
        if slot.startswith(tweaked.prefix(0)):  # later blocks are calibrated on what the first has become
            assert torch.equal(tweaked.weight(slot).unpack(), plain.weight(slot).unpack())
    ours = {tweaked.prefix(0) + each.norm.name for each in normed(tweaked) if each.norm is not None}
    ours |= {each.removesuffix("weight") + "bias" for each in ours}
    before, after = gains(plain), gains(tweaked)
    changed = {n for n in before if n.startswith(tweaked.prefix(0)) and not torch.equal(before[n], after[n])}
    assert changed
    assert changed <= ours


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2"])
def test_a_factor_scales_what_the_norm_gives(name: str, tmp_path: Path) -> None:
    """Offsets (Gemma) and biases (GPT-2) included: what the matrices read is the same with each channel multiplied."""
    make_base(tmp_path, name)
    model = open_model(tmp_path / "base")
    factors = torch.linspace(0.5, 1.5, model.shape(model.family.embed)[1])

    class Fixed(NormTweaking):
        def factors(self, *_: Any) -> torch.Tensor:
            return factors

    block = loaded(model, 0)
    stats = {each.edge: {PairedGram: PairedGram.neutral(each.width)} for each in normed(model)}
    changed = {name: Dense.of(weight.unpack() * 0.9) for name, weight in block.weights.items()}
    made = each_gain(Fixed(), normed(model))(replace(block, weights=changed, stats=stats))
    for each in normed(model):
        assert each.norm is not None
        gain = model.prefix(0) + each.norm.name
        offset = each.norm.offset
        torch.testing.assert_close(made.vectors[gain] + offset, (block.vectors[gain] + offset) * factors)
        bias = gain.removesuffix("weight") + "bias"
        if bias in block.vectors:
            torch.testing.assert_close(made.vectors[bias], block.vectors[bias] * factors)


def test_it_makes_up_for_pruning(stories: Path, story_text: Path, tmp_path: Path) -> None:
    data = {"source": str(story_text), "num_sequences": 48, "sequence_length": 128}
    found = {}
    for name, steps in {"plain": [], "tweaked": [TWEAK]}.items():
        decoct.compress(stories, {"data": data, "stages": [{"blocks": [WANDA, *steps]}]}, tmp_path / name)
        measured = decoct.evaluate(tmp_path / name, text=story_text, against=stories, windows=16, length=256)
        found[name] = measured.kl_mean
    assert found["tweaked"] < 0.98 * found["plain"], found


def test_it_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base(tmp_path)
    whole = digests(run(base, tmp_path / "whole", GPTQ, TWEAK).folder)
    with monkeypatch.context() as patch:
        patch.setattr(stream, "write_shard", crash_at(2, stream.write_shard))
        with pytest.raises(Crash):
            run(base, tmp_path / "out", GPTQ, TWEAK)
    assert digests(run(base, tmp_path / "out", GPTQ, TWEAK).folder) == whole


@pytest.mark.parametrize("width", [64, 600])
def test_wide_norms_too(width: int) -> None:
    """Statistics are gathered in tiles; what lies below the diagonal has to be filled in first."""
    x, was = correlated(2 * width, width), [gaussian(32, width, seed=1)]
    stat = PairedGram.empty(width)
    stat.add_pair(x, x)
    torch.testing.assert_close(NormTweaking().factors(was, was, stat), torch.ones(width), rtol=1e-3, atol=1e-3)
    became = [was[0] * (was[0].abs() > 0.7)]
    factors = NormTweaking(damping=1e-6).factors(became, was, stat)
    left = [((x * scale) @ became[0].T - x @ was[0].T).square().sum() for scale in (torch.ones(width), factors)]
    assert left[1] < 0.95 * left[0]


def test_damaged_statistics_are_named() -> None:
    stat = PairedGram.empty(64)
    x = correlated(200, 64)
    x[3, 4] = torch.inf
    stat.add(x)
    with pytest.raises(ValueError, match="NaN or infinite"):
        NormTweaking().factors(readers(), readers(), stat)


REFUSED: dict[str, tuple[str, list[Settings], str]] = {
    "nothing before it": ("llama", [TWEAK], "makes up for the steps before it, and there is none"),
    "something behind it": ("llama", [WANDA, TWEAK, RTN], "put it last in its list"),
    "norms behind the matrices": ("olmo2", [WANDA, TWEAK], "leave norm_tweaking out"),
    "experts": ("mixtral", [WANDA, TWEAK], "leave norm_tweaking out"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_while_planning(case: str, tmp_path: Path) -> None:
    name, steps, message = REFUSED[case]
    base = make_base(tmp_path, name)
    with pytest.raises(ValueError, match=message):
        decoct.plan(base, {"data": {"source": str(tmp_path / "text.txt")}, "stages": [{"blocks": steps}]})


def test_settings_out_of_range() -> None:
    for settings in ({"alpha": 1.5}, {"damping": 0.0}):
        with pytest.raises(ValueError, match="must"):
            NormTweaking(**settings)


def test_the_plan_counts_it(tmp_path: Path) -> None:
    base = make_base(tmp_path)
    data = {"source": str(base.parent / "text.txt"), "num_sequences": 4, "sequence_length": 16}
    plans = [decoct.plan(base, {"data": data, "stages": [{"blocks": steps}]}) for steps in ([RTN], [RTN, TWEAK])]
    assert [plan.needs_data for plan in plans] == [False, True]
    assert plans[1].seconds > plans[0].seconds
    shown = {type(m).__name__ for g in plans[1].stages[0].groups if g.role == "attn.q" for m in g.methods}
    assert shown == {"RTN", "NormTweaking"}

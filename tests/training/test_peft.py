"""Adapters in peft's format: what peft makes of ours, what we make of peft's, LoftQ's start, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import decoct
from decoct.exporters import MisfitError, export_model
from decoct.methods.quantize.loftq import LoftQ
from decoct.methods.quantize.rtn import RTN
from decoct.model import open_model
from decoct.weights import Dense, GroupInt, Sum, describe
from tests.arch.test_families import our_logits
from tests.engine.running import GPTQ, Settings, digests, make_base, run
from tests.reference.inputs import gaussian

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft's own use of transformers
SHORT: Settings = {"num_steps": 3, "batch_size": 2, "sequence_length": 16, "learning_rate": 0.1}
LORA: Settings = {"distill": {**SHORT, "train": ["lora"], "rank": 2}}


def tokens() -> torch.Tensor:
    return torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2"])
@torch.no_grad()
def test_peft_loads_what_was_trained(name: str, tmp_path: Path) -> None:
    """On the stock model: the same logits, and not those of the base."""
    base = make_base(tmp_path, name)
    with torch.enable_grad():
        made = open_model(run(base, tmp_path / "out", stages=[{"blocks": [GPTQ]}, LORA]).folder)
    report = export_model(made, "peft", tmp_path / "peft")
    assert report.ok
    assert {check.name: check.ok for check in report.checks} == {"load": True, "logits": True}
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "peft" / "base", dtype=torch.float32).eval()
    before = stock(tokens()).logits
    adapted = PeftModel.from_pretrained(stock, str(tmp_path / "peft")).eval()
    theirs = adapted(tokens()).logits
    torch.testing.assert_close(theirs, our_logits(made, tokens()), rtol=1e-4, atol=1e-4)
    assert float((theirs - before).abs().max()) > 0.01


def peft_adapter(base: Path, folder: Path, **settings: Any) -> Any:
    """An adapter that peft made and saved, and its model."""
    stock = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    given = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **settings}
    adapted = get_peft_model(stock, LoraConfig(**given)).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for key, parameter in adapted.named_parameters():
            if "lora_" in key:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(str(folder))
    return adapted


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 9}}],
    ids=["usual", "rslora", "patterns"],
)
@torch.no_grad()
def test_an_adapter_of_peft_becomes_sums(settings: dict[str, Any], base: Path, tmp_path: Path) -> None:
    adapted = peft_adapter(base, tmp_path / "adapter", **settings)
    stages = [{"adapter": {"folder": str(tmp_path / "adapter")}}]
    planned = decoct.plan(base, {"stages": stages})
    result = run(base, tmp_path / "out", stages=stages)
    made = open_model(result.folder)
    torch.testing.assert_close(our_logits(made, tokens()), adapted(tokens()).logits, rtol=1e-4, atol=1e-4)
    assert planned.result is not None
    assert made.described == planned.result.described
    assert result.nbytes == planned.output_bytes
    export_model(made, "peft", tmp_path / "again")
    stock = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    again = PeftModel.from_pretrained(stock, str(tmp_path / "again")).eval()
    torch.testing.assert_close(again(tokens()).logits, adapted(tokens()).logits, rtol=1e-4, atol=1e-4)


def test_an_adapter_on_rounded_matrices_is_trained_further(base: Path, tmp_path: Path) -> None:
    peft_adapter(base, tmp_path / "adapter")
    further = {"distill": {**LORA["distill"], "train": ["corrections"]}}
    stages: list[Settings] = [{"blocks": [GPTQ]}, {"adapter": {"folder": str(tmp_path / "adapter")}}]
    before = open_model(run(base, tmp_path / "before", stages=stages).folder)
    data = {"source": str(base.parent / "text.txt"), "num_sequences": 4, "sequence_length": 16}
    planned = decoct.plan(base, {"stages": [*stages, further], "data": data})
    (group,) = planned.stages[-1].groups
    assert group.parameters == 3 * 3 * (32 + 32 + 48 + 32)
    after = open_model(run(base, tmp_path / "after", stages=[*stages, further]).folder)
    assert after.described == before.described
    for name in before.slots():
        old, new = before.weight(name).tensors(), after.weight(name).tensors()
        changed = {part for part in old if not torch.equal(old[part], new[part])}
        assert changed == {part for part in old if part.startswith("terms.1.")}
    again = digests(run(base, tmp_path / "again", stages=[*stages, further]).folder)
    assert again == digests(tmp_path / "after")


def damage(folder: Path, **settings: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "IA3"}, "is a IA3 adapter; decoct reads those of the type LORA"),
        ({"use_dora": True}, "uses use_dora, which is no low-rank term"),
        ({"bias": "all"}, "has trained biases too"),
    ],
)
def test_other_adapters_are_refused(settings: dict[str, Any], message: str, base: Path, tmp_path: Path) -> None:
    peft_adapter(base, tmp_path / "adapter")
    damage(tmp_path / "adapter", **settings)
    with pytest.raises(ValueError, match=message):
        decoct.plan(base, {"stages": [{"adapter": {"folder": str(tmp_path / "adapter")}}]})


def test_an_adapter_of_another_model_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere is no adapter in peft's format: it has no adapter_config.json"):
        decoct.plan(base, {"stages": [{"adapter": {"folder": "nowhere"}}]})
    other = make_base(tmp_path, intermediate_size=64)
    peft_adapter(other, tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"adapts model.layers.0.mlp.down_proj as a 32x64 matrix, in .* it is 32x48"):
        decoct.plan(base, {"stages": [{"adapter": {"folder": str(tmp_path / "adapter")}}]})


def test_what_peft_cannot_hold_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(MisfitError, match=r"has no low-rank terms beside its matrices"):
        export_model(open_model(base), "peft", tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


# LoftQ


def test_loftq_is_nearer_than_rounding_and_a_term_for_what_it_loses() -> None:
    w = gaussian(48, 64, seed=1)
    lost = {}
    for steps in (1, 5):
        made = LoftQ(bits=2, group_size=16, rank=8, num_steps=steps).compress(Dense.of(w), None)
        assert isinstance(made, Sum)
        assert [term.kind for term in made.terms] == ["GroupInt", "LowRank"]
        lost[steps] = float((w - made.unpack()).norm())
    rounded = RTN(bits=2, group_size=16).compress(Dense.of(w), None)
    assert isinstance(rounded, GroupInt)
    error = (w - rounded.unpack()).double()
    u, s, v = torch.linalg.svd(error)
    by_hand = float((error - (u[:, :8] * s[:8]) @ v[:8]).norm())
    assert lost[1] == pytest.approx(by_hand, rel=1e-4)
    assert lost[5] < 0.97 * lost[1]


def test_loftq_is_a_start_for_lora(base: Path, tmp_path: Path) -> None:
    loftq = {"linear": {"loftq": {"bits": 3, "group_size": 8, "rank": 2}}}
    further = {"distill": {**LORA["distill"], "train": ["corrections"]}}
    start = open_model(run(base, tmp_path / "start", loftq).folder)
    made = open_model(run(base, tmp_path / "out", stages=[{"blocks": [loftq]}, further]).folder)
    name = "model.layers.1.mlp.up_proj.weight"
    assert describe(made.weight(name)) == describe(start.weight(name))
    assert torch.equal(made.weight(name).tensors()["terms.0.codes"], start.weight(name).tensors()["terms.0.codes"])
    assert not torch.equal(
        made.weight(name).tensors()["terms.1.left.values"], start.weight(name).tensors()["terms.1.left.values"]
    )

"""Mixtures of experts: each expert's own statistics, experts that no token reaches, routers left as they are."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM

import decoct.hf  # noqa: F401 - registers the format
from decoct.engine import block
from decoct.engine.admission import calibration_tokens
from decoct.engine.job import Watch
from decoct.model import Model, open_model
from decoct.stats import Gram
from tests.arch.test_families import our_logits
from tests.engine.running import GPTQ, make_base, make_job, run

MIXTURES = pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
EXPERTS: dict[str, tuple[str, str, str, str]] = {
    "mixtral": ("block_sparse_moe.experts.{}.", "w1", "w3", "w2"),
    "qwen3_moe": ("mlp.experts.{}.", "gate_proj", "up_proj", "down_proj"),
}
FEW = {"num_sequences": 1, "sequence_length": 2}


def spied_statistics(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What each matrix's method is given, by the matrix's name."""
    found: dict[str, Any] = {}
    apply = block.apply_method

    def spy(method: Any, weight: Any, stat: Any, original: Any, name: str) -> Any:
        found[name] = stat
        return apply(method, weight, stat, original, name)

    monkeypatch.setattr(block, "apply_method", spy)
    return found


def routed(model: Model, x: Tensor) -> list[Tensor]:
    """What each expert of block 0 reads, from the router's matrix: the tokens that count it among their best two."""
    router = model.weight(next(n for n, slot in model.slots().items() if slot.role == "moe.router")).unpack().double()
    best = (x @ router.T).topk(2, dim=-1).indices
    return [x[(best == expert).any(-1)] for expert in range(4)]


@MIXTURES
@torch.no_grad()
def test_each_experts_statistics_are_of_its_own_tokens(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against float64 sums over the tokens that transformers' hidden states and the router's matrix give."""
    base = make_base(tmp_path, name, num_hidden_layers=1)
    job = make_job(base, tmp_path / "out", GPTQ)
    tokens = calibration_tokens(job, tmp_path / "run", Watch())
    found = spied_statistics(monkeypatch)
    run(base, tmp_path / "out", GPTQ)
    reference = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64, experts_implementation="eager")
    read: list[Tensor] = []
    reference.model.layers[0].mlp.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    reference(tokens)
    model = open_model(base)
    x = torch.cat(read).reshape(-1, read[0].shape[-1])
    pattern, gate, up, down = EXPERTS[name]
    counts = []
    for expert, own in enumerate(routed(model, x)):
        prefix = model.prefix(0) + pattern.format(expert)
        matrices = {part: model.weight(f"{prefix}{part}.weight").unpack().double() for part in (gate, up)}
        inner = functional.silu(own @ matrices[gate].T) * (own @ matrices[up].T)
        for part, inputs in ((gate, own), (up, own), (down, inner)):
            stat = found[f"{prefix}{part}.weight"]
            assert isinstance(stat, Gram)
            assert stat.num_tokens == len(own)
            torch.testing.assert_close(stat.total.double(), inputs.T @ inputs, rtol=1e-3, atol=1e-3)
        counts.append(len(own))
    assert sum(counts) == 2 * len(x)
    assert len(set(counts)) > 1, "the experts are told apart"


@MIXTURES
def test_starved_experts_are_compressed_without_data(name: str, tmp_path: Path) -> None:
    """They are reported, and get what rounding to nearest on the same grid gives; the others learn from tokens."""
    base = make_base(tmp_path, name, num_hidden_layers=1)
    starved = set(run(base, tmp_path / "gptq", GPTQ, data=FEW).starved)
    run(base, tmp_path / "rtn", {"linear": {"rtn": {"bits": 4, "group_size": 8, "clip_search": True}}})
    learned, plain = open_model(tmp_path / "gptq"), open_model(tmp_path / "rtn")
    experts = {n for n, slot in learned.slots().items() if slot.expert is not None}
    assert 0 < len(starved) < len(experts)
    assert starved < experts
    differ = {n: float((learned.weight(n).unpack() != plain.weight(n).unpack()).float().mean()) for n in experts}
    assert all((share < 0.01) == (n in starved) for n, share in differ.items()), differ


@MIXTURES
@torch.no_grad()
def test_it_is_pruned_by_magnitude_where_no_token_came(name: str, tmp_path: Path) -> None:
    base = make_base(tmp_path, name, num_hidden_layers=1)
    result = run(base, tmp_path / "out", {"linear": {"wanda": {"sparsity": 0.5}}}, data=FEW)
    assert result.starved
    for each in result.starved:
        before, after = open_model(base).weight(each).unpack().abs(), open_model(result.folder).weight(each).unpack()
        smallest = before.argsort(1)[:, : before.shape[1] // 2]
        assert bool((after.gather(1, smallest) == 0).all())


@MIXTURES
@pytest.mark.parametrize("method", ["qtip", "squeezellm", "spqr", "owq", "awq_clip"])
def test_every_calibrated_quantizer_takes_starved_experts(method: str, name: str, tmp_path: Path) -> None:
    small = {"qtip": {"state_bits": 4}, "squeezellm": {"bits": 3}}.get(method, {"group_size": 8})
    base = make_base(tmp_path, name, num_hidden_layers=1)
    rules = [{"match": "moe.*", method: small}]
    result = run(base, tmp_path / "out", {"linear": rules}, data=FEW)
    assert result.starved
    made, before = open_model(result.folder), open_model(base)
    for each in result.starved:
        original = before.weight(each).unpack()
        assert (made.weight(each).unpack() - original).norm() < 0.5 * original.norm()


@MIXTURES
@pytest.mark.parametrize("match", ["*", "moe.*", "*router*", "*gate*"])
@torch.no_grad()
def test_routers_stay_as_they_are(match: str, name: str, tmp_path: Path) -> None:
    """No pattern but their own name reaches them; the result, packed, gives our logits in transformers."""
    base = make_base(tmp_path, name, num_hidden_layers=2)
    if match == "*router*":
        with pytest.raises(ValueError, match="matches nothing"):
            run(base, tmp_path / "out", {"linear": {"match": match, "rtn": {"group_size": 8}}})
        return
    made = open_model(run(base, tmp_path / "out", {"linear": {"match": match, "gptq": {"group_size": 8}}}).folder)
    before = open_model(base)
    routers = [n for n, slot in before.slots().items() if slot.role == "moe.router"]
    assert len(routers) == 2
    assert not made.described.keys() & set(routers)
    assert all(torch.equal(made.tensor(n), before.tensor(n)) for n in routers)
    assert any(slot.expert is not None for n, slot in made.slots().items() if n in made.described)
    if match == "*":
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
        tokens = torch.randint(3, 60, (2, 24), generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(loaded(tokens).logits, our_logits(made, tokens), rtol=1e-4, atol=1e-5)

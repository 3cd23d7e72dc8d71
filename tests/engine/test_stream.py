"""One pass over the blocks: which statistics are gathered, from what inputs, and what becomes of the weights."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from decoct.arch import edges
from decoct.arch.hf import dense_model
from decoct.engine import stream
from decoct.engine.compress import compress_job
from decoct.engine.data import Data, load_tokens, text_tokens
from decoct.engine.job import Watch
from decoct.engine.rules import Rule, assign
from decoct.methods.quantize import gptq
from decoct.model import Model, open_model
from decoct.stats import ColumnNorm, Gram
from decoct.weights import GroupInt, LowRank, Sparse, Sum, Weight
from tests.engine.running import EORA, EVERYTHING, GPTQ, RTN, WANDA, digests, make_base, make_job, run
from tests.tiny import make_model

LINEARS = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]


class Spy:
    """Notes which statistic object each matrix got, in order, while GPTQ works as always."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[tuple[int, int], Gram]] = []
        original = gptq.GPTQ.compress

        def compress(method: gptq.GPTQ, weight: Weight, stat: Gram) -> Weight:
            self.seen.append((weight.shape, stat))
            return original(method, weight, stat)

        monkeypatch.setattr(gptq.GPTQ, "compress", compress)
        self.watch = Watch(planned=lambda *_: self.seen.clear())  # planning rehearses the methods


def inputs_of(network: torch.nn.Module, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """What each linear layer of transformers' own model reads, by module name: [tokens, in]."""
    found: dict[str, torch.Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, arguments, name=name: found.__setitem__(name, arguments[0].reshape(-1, arguments[0].shape[-1]))
        )
        for name, module in network.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    with torch.no_grad():
        network(tokens)
    for hook in hooks:
        hook.remove()
    return found


def gram(x: torch.Tensor) -> torch.Tensor:
    return 2 / x.shape[0] * (x.double().T @ x.double()).float()


def unpacked(model: Model) -> dict[str, torch.Tensor]:
    found = {name: model.weight(name).unpack() for name in model.slots()}
    for block in (None, *range(model.num_blocks)):
        found.update({name: model.tensor(name) for name in model.others(block)})
    return found


def test_readers_of_an_edge_share_one_statistic(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spy = Spy(monkeypatch)
    run(base, tmp_path / "out", GPTQ, watch=spy.watch)
    assert len(spy.seen) == 3 * 7
    for block in range(3):
        q, k, v, o, gate, up, down = (stat for _, stat in spy.seen[7 * block : 7 * block + 7])
        assert q is k is v
        assert gate is up
        assert len({id(q), id(o), id(gate), id(down)}) == 4
        assert all(stat.num_tokens == 4 * 16 for stat in (q, o, gate, down))


def test_only_what_is_asked_for_is_gathered(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: Counter[type] = Counter()
    for kind in (Gram, ColumnNorm):
        original = kind.empty.__func__  # type: ignore[attr-defined]

        def empty(cls: type, width: int, original: Any = original) -> Any:
            made[cls] += 1
            return original(cls, width)

        monkeypatch.setattr(kind, "empty", classmethod(empty))
    watch = Watch(planned=lambda *_: made.clear())  # planning rehearses the methods
    run(base, tmp_path / "a", GPTQ, watch=watch)
    assert made == {Gram: 3 * 4}
    run(base, tmp_path / "b", WANDA, GPTQ, watch=watch)
    assert made == {Gram: 3 * 4, ColumnNorm: 3 * 4}
    rules = [{"match": "1.mlp.down", "gptq": {"group_size": 8}}, {"rtn": {"group_size": 8}}]
    run(base, tmp_path / "c", {"linear": rules}, watch=watch)
    assert made == {Gram: 1}


def test_statistics_are_of_the_compressed_models_inputs(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Block i sees what the blocks before it, already compressed, put out: checked against transformers' own model."""
    spy = Spy(monkeypatch)
    job = make_job(base, tmp_path / "out", EVERYTHING)
    result = compress_job(job, spy.watch)
    before, after = unpacked(job.model), unpacked(open_model(result.folder))
    tokens = load_tokens(job.data, job.model, print)
    for block in range(3):
        earlier = (job.model.family.embed, *(f"model.layers.{i}." for i in range(block)))
        mixed = {name: after[name] if name.startswith(earlier) else before[name] for name in before}
        inputs = inputs_of(dense_model(job.model.config, job.model.family, mixed), tokens)
        for (_, stat), linear in zip(spy.seen[7 * block : 7 * block + 7], LINEARS, strict=True):
            expected = gram(inputs[f"model.layers.{block}.{linear}"])
            torch.testing.assert_close(stat.matrix(), expected, rtol=1e-4, atol=1e-5 * float(expected.max()))


def test_lm_head_of_an_untied_model(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spy = Spy(monkeypatch)
    head = {"linear": {"match": "lm_head", "gptq": {"group_size": 8}}}
    job = make_job(base, tmp_path / "out", head)
    result = compress_job(job, spy.watch)
    ((shape, stat),) = spy.seen
    assert shape == (96, 32)
    tokens = load_tokens(job.data, job.model, print)
    x = inputs_of(dense_model(job.model.config, job.model.family, unpacked(job.model)), tokens)["lm_head"]
    torch.testing.assert_close(stat.matrix(), gram(x), rtol=1e-4, atol=1e-5)
    model = open_model(result.folder)
    assert isinstance(model.weight("lm_head.weight"), GroupInt)
    assert model.described.keys() == {"lm_head.weight"}


def test_a_tied_embedding_is_compressed_once(tmp_path: Path) -> None:
    base = make_base(tmp_path, "llama-tied")
    both = {"linear": {"match": ["embed", "lm_head"], "rtn": {"bits": 8, "group_size": 8}}}
    result = run(base, tmp_path / "out", both)
    model = open_model(result.folder)
    assert model.described.keys() == {"model.embed_tokens.weight"}
    assert model.tied
    names = list(model.source.names())
    assert len(names) == len(set(names))
    assert not any(name.startswith("lm_head") for name in names)
    named = run(base, tmp_path / "named", {"linear": {"match": "lm_head", "rtn": {"bits": 8, "group_size": 8}}})
    assert result.nbytes == named.nbytes
    assert result.errors.keys() == {"embedding"}


@pytest.mark.parametrize("batch", [16, 32, 4096])
def test_batches_change_only_rounding(batch: int, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for out, tokens in (("out", batch), ("whole", 10_000)):
        monkeypatch.setattr("decoct.engine.runner._TOKENS_AT_ONCE", tokens)
        spy = Spy(monkeypatch)
        run(base, tmp_path / out, GPTQ, data={"num_sequences": 6}, watch=spy.watch)
        seen.append([stat for _, stat in spy.seen])
    assert {stat.num_tokens for stats in seen for stat in stats} == {6 * 16}
    for ours, theirs in zip(*(stats[:7] for stats in seen), strict=True):
        torch.testing.assert_close(ours.matrix(), theirs.matrix(), rtol=1e-4, atol=1e-5)


def test_an_error_is_the_error(base: Path, tmp_path: Path) -> None:
    """The reported one: what compressing changed of the block's update to the residual stream, relative."""
    job = make_job(base, tmp_path / "out", RTN)
    silent = run(base, tmp_path / "silent", RTN)
    assert silent.errors.keys() == {"block 0", "block 1", "block 2"}
    only = {"linear": [{"match": "0.*", "gptq": {"group_size": 8, "bits": 3}}]}
    result = run(base, tmp_path / "one", only)
    assert result.errors["block 0"] > 0
    assert result.errors["block 1"] == pytest.approx(0.0, abs=1e-9)
    tokens = load_tokens(job.data, job.model, print)
    before, after = unpacked(job.model), unpacked(open_model(result.folder))
    states = []
    for tensors in (before, after):
        network = dense_model(job.model.config, job.model.family, tensors)
        with torch.no_grad():
            states.append(network(tokens, output_hidden_states=True).hidden_states)
    (x, y), (_, z) = states[0][:2], states[1][:2]
    assert result.errors["block 0"] == pytest.approx(float((z - y).square().sum() / (y - x).square().sum()), rel=1e-4)


def test_steps_see_what_earlier_steps_made(base: Path, tmp_path: Path) -> None:
    model = open_model(run(base, tmp_path / "a", WANDA, GPTQ).folder)
    pruned = open_model(run(base, tmp_path / "b", WANDA).folder)
    name = "model.layers.0.mlp.up_proj.weight"
    sparse = pruned.weight(name)
    assert isinstance(sparse, Sparse)
    assert (model.weight(name).unpack()[~sparse.survivors()] == 0).all()
    corrected = open_model(run(base, tmp_path / "c", GPTQ, EORA).folder).weight(name)
    assert isinstance(corrected, Sum)
    quantized, term = corrected.terms
    assert isinstance(quantized, GroupInt)
    assert isinstance(term, LowRank)
    alone = open_model(run(base, tmp_path / "d", GPTQ).folder).weight(name)
    assert torch.equal(quantized.unpack(), alone.unpack())


def test_starved_experts_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base(tmp_path, "mixtral")
    events: list[Any] = []
    data = {"num_sequences": 1, "sequence_length": 2}
    result = run(base, tmp_path / "out", GPTQ, data=data, watch=Watch(event=events.append))
    assert 0 < len(result.starved) < 3 * 4 * 3
    assert all(".experts." in name for name in result.starved)
    assert result.starved == tuple(name for event in events for name in event.starved)
    experts = Counter(name.rsplit(".", 2)[0] for name in result.starved)
    assert set(experts.values()) == {3}, "an expert that no token reaches lacks all three of its inputs"
    model = open_model(result.folder)
    for name in result.starved:
        weight = model.weight(name)
        assert isinstance(weight, GroupInt)
        original = open_model(base).weight(name).unpack()
        assert (weight.unpack() - original).norm() < 0.15 * original.norm()
    assert not run(base, tmp_path / "fed", GPTQ, data={"num_sequences": 8, "sequence_length": 64}).starved


def test_starved_experts_are_still_known_after_resuming(tmp_path: Path) -> None:
    base = make_base(tmp_path, "mixtral")
    data = {"num_sequences": 1, "sequence_length": 2}
    starved = run(base, tmp_path / "whole", GPTQ, data=data).starved

    def event(found: stream.Event) -> None:
        if found.part == "block 2":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(base, tmp_path / "out", GPTQ, data=data, watch=Watch(event=event))
    assert run(base, tmp_path / "out", GPTQ, data=data).starved == starved
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_activations_that_are_not_finite_stop_the_run(tmp_path: Path) -> None:
    model = make_model("llama", torch.float32)
    base = make_base(tmp_path)
    model.model.layers[1].input_layernorm.weight.data.fill_(1e30)
    model.model.layers[1].self_attn.v_proj.weight.data.mul_(1e20)
    model.save_pretrained(base)
    with pytest.raises(ValueError, match=r"block 1 gives NaN or infinite activations|block 1|layers\.1"):
        run(base, tmp_path / "out", GPTQ)


def test_events_tell_parts_in_order(base: Path, tmp_path: Path) -> None:
    events: list[stream.Event] = []
    result = run(base, tmp_path / "out", EVERYTHING, watch=Watch(event=events.append))
    assert [event.part for event in events] == ["embedding", "block 0", "block 1", "block 2", "lm_head"]
    assert [(event.done, event.total) for event in events] == [(n + 1, 5) for n in range(5)]
    assert sum(event.nbytes for event in events) == result.nbytes


def test_the_original_file_is_not_written_to(base: Path, tmp_path: Path) -> None:
    before = digests(base)
    run(base, tmp_path / "out", EVERYTHING)
    assert digests(base) == before


# Rules


def names(base: Path, *rules: Rule) -> dict[str, int]:
    assignment = assign(open_model(base), rules)
    bits = {name: method.bits for name, method in assignment.methods.items() if isinstance(method, gptq.GPTQ)}
    assert not set(bits) & set(assignment.left)
    return bits


@pytest.mark.parametrize(
    ("pattern", "hits"),
    [
        ("*", 21), ("mlp.down", 3), ("mlp.*", 9), ("1.mlp.down", 1), ("1.*", 7), ("[02].attn.q", 2),
        ("model.layers.2.mlp.up_proj.weight", 1), ("*.up_proj.weight", 3), ("embed", 1), ("lm_head", 1),
        ("model.embed_tokens.weight", 1), ("*q_proj*", 3),
    ],
)  # fmt: skip
def test_patterns(pattern: str, hits: int, base: Path) -> None:
    assert len(names(base, Rule((pattern,), gptq.GPTQ()))) == hits


def test_the_first_rule_that_matches_decides(base: Path) -> None:
    rules = (
        Rule(("0.*",), None),
        Rule(("mlp.down",), gptq.GPTQ(bits=6)),
        Rule(("*",), gptq.GPTQ(bits=4)),
        Rule(("embed",), gptq.GPTQ(bits=8), min_share=0.99),
    )
    bits = names(base, *rules)
    assert Counter(bits.values()) == {6: 2, 4: 12}
    assert not any(name.startswith("model.layers.0.") for name in bits)


def test_a_rule_that_earlier_rules_leave_nothing_to_is_refused(base: Path) -> None:
    everything, down = Rule(("*",), gptq.GPTQ(bits=4)), Rule(("mlp.down",), gptq.GPTQ(bits=8))
    with pytest.raises(ValueError, match=r"rule 'mlp\.down' never applies: the rules before it take .*put it before"):
        names(base, everything, down)
    with pytest.raises(ValueError, match=r"rule '0\.mlp\.down' never applies"):
        names(base, everything, Rule(("0.mlp.down",), None))
    assert names(base, down, everything)["model.layers.0.mlp.down_proj.weight"] == 8
    alone = names(base, everything)
    assert names(base, everything, Rule(("mlp.down",), gptq.GPTQ(bits=4))) == alone, "it asks for what they get"
    assert names(base, everything, Rule(("mlp.down",), gptq.GPTQ(bits=8), min_share=0.001)) == alone


def test_a_rule_with_a_share_may_match_nothing(base: Path) -> None:
    """So that one recipe serves models with experts and without."""
    experts = Rule(("moe.*",), None, min_share=0.001)
    assert names(base, experts, Rule(("*",), gptq.GPTQ())) == names(base, Rule(("*",), gptq.GPTQ()))
    with pytest.raises(ValueError, match="matches nothing"):
        names(base, Rule(("moe.*",), None))


def test_a_router_is_left_alone_unless_named(tmp_path: Path) -> None:
    base = make_base(tmp_path, "mixtral")
    everything = names(base, Rule(("*",), gptq.GPTQ()))
    assert not any(".gate.weight" in name for name in everything)
    assert len(everything) == 3 * (4 + 4 * 3)
    assert len(names(base, Rule(("moe.router",), gptq.GPTQ()))) == 3
    assert len(names(base, Rule(("1.2.moe.down",), gptq.GPTQ()))) == 1
    edge = edges(open_model(base).block_slots)
    assert [slot.role for slot in edge["expert.2.in"].readers] == ["moe.gate", "moe.up"]


# Tokens


def test_tokens_come_from_the_start(base: Path) -> None:
    model, text = open_model(base), str(base.parent / "text.txt")
    everything = text_tokens(text, model)
    assert torch.equal(text_tokens(text, model, 50), everything[:50])
    tokens = load_tokens(Data(source=text, num_sequences=3, sequence_length=10), model, print)
    assert torch.equal(tokens.reshape(-1), everything[:30])


def test_self_written_tokens(base: Path) -> None:
    model = open_model(base)
    data = Data(num_sequences=5, sequence_length=12)
    tokens = load_tokens(data, model, lambda _: None)
    assert tokens.shape == (5, 12)
    assert (tokens[:, 0] == 1).all()
    assert (tokens >= 0).all()
    assert (tokens < 96).all()
    assert torch.equal(load_tokens(data, model, lambda _: None), tokens)
    other = data.model_copy(update={"seed": 1})
    assert not torch.equal(load_tokens(other, model, lambda _: None), tokens)


def test_self_written_tokens_need_no_cache(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = open_model(base), Data(num_sequences=3, sequence_length=8, seed=3)
    found = []
    for cache in ("a", "b"):
        monkeypatch.setenv("DECOCT_CACHE", str(tmp_path / cache))
        torch.manual_seed(len(cache) + 5)
        found.append(load_tokens(data, model, lambda _: None))
        torch.rand(3)
    assert torch.equal(*found)


def test_methods_are_not_changed_by_a_run(base: Path, tmp_path: Path) -> None:
    job = make_job(base, tmp_path / "out", GPTQ)
    before = replace(job)
    compress_job(job, Watch())
    assert job == before

"""Folded scales change the weights and nothing that the model computes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from decoct.arch import Norm
from decoct.engine.block import Block
from decoct.engine.folding import Fold, fold, folds
from decoct.engine.runner import Runner
from decoct.model import Model, open_model
from decoct.stats import AbsMax, ColumnNorm, Gram, Moments
from decoct.store import open_safetensors
from decoct.weights import Dense
from tests.engine.running import GPTQ, RTN, WANDA, Settings, digests, make_base, make_job, run
from tests.tiny import CONFIGS, save_model

STATS: list[Any] = [Gram, ColumnNorm, AbsMax, Moments]
FOLDABLE = {
    "llama": 4, "llama-tied": 4, "mistral": 4, "qwen2": 4, "qwen3": 4, "gemma2": 4, "gemma3_text": 4, "phi3": 2,
    "olmo2": 2, "gpt2": 2, "opt": 3, "gpt_neox": 2, "mixtral": 6, "qwen3_moe": 6,
}  # fmt: skip


def loaded(model: Model, number: int) -> Block:
    prefix = model.prefix(number)
    slots = {prefix + slot.name: slot for slot in model.block_slots}
    weights = {name: model.weight(name) for name in slots}
    vectors = {name: model.tensor(name) for name in model.others(number)}
    stats = {slot.reads: {Gram: Gram.neutral(model.shape(name)[1])} for name, slot in slots.items()}
    return Block(f"block {number}", slots, weights, weights, stats, vectors=vectors, prefix=prefix)


def folded(block: Block, found: tuple[Fold, ...]) -> Block:
    generator = torch.Generator().manual_seed(3)
    for each in found:
        block = fold(block, each, torch.exp(torch.randn(each.width, generator=generator)))
    return block


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_the_model_computes_the_same(name: str, tmp_path: Path) -> None:
    reference = save_model(name, tmp_path)
    model, tokens = open_model(tmp_path), torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(1))
    found = folds(model)
    assert len(found) == FOLDABLE[name]
    runner = Runner(model, torch.float32)
    hidden = runner.embed(tokens, model.weight(model.family.embed).unpack(torch.float32))
    for number in range(model.num_blocks):
        before, block = loaded(model, number), folded(loaded(model, number), found)
        for each in found:
            for reader in each.readers:
                full = model.prefix(number) + reader
                assert not torch.equal(block.weights[full].unpack(), before.weights[full].unpack())
        hidden = runner.run(number, runner.lay_out(number, block.weights, block.vectors), hidden)
    head = model.weight(model.family.embed if model.tied else model.family.head).unpack(torch.float32)
    torch.testing.assert_close(runner.logits(hidden, head), reference(tokens).logits, rtol=1e-3, atol=1e-4)


def test_norms_after_the_sublayer_take_no_scales(tmp_path: Path) -> None:
    """OPT-350m's layout: its gains write the residual stream, which others read too."""
    save_model("opt", tmp_path, do_layer_norm_before=False)
    assert [each.edge for each in folds(open_model(tmp_path))] == ["attn_mid"]


def test_a_gain_that_the_dtype_cannot_hold_is_left_alone() -> None:
    gain = torch.tensor([2e-4, 8.0, 1.0, 0.0], dtype=torch.float16)
    w = Dense.of(torch.ones(1, 4))
    block = Block("block 0", {}, {"0.r": w}, {"0.r": w}, {"e": {}}, vectors={"0.n.weight": gain}, prefix="0.")
    made = fold(block, Fold("e", ("r",), Norm("n.weight", "e"), None, 4), torch.tensor([1e4, 1e-4, 2.0, 3.0]))
    product = made.vectors["0.n.weight"].float() * made.weights["0.r"].unpack()[0]
    torch.testing.assert_close(product, gain.float(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("kind", STATS)
def test_a_scaled_statistic_is_that_of_scaled_inputs(kind: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    x, factor = torch.randn(50, 12, generator=generator), torch.rand(12, generator=generator) + 0.5
    one, other = kind.empty(12), kind.empty(12)
    one.add(x)
    other.add(x * factor)
    for name, value in vars(one.scaled(factor)).items():
        torch.testing.assert_close(value, vars(other)[name], rtol=1e-5, atol=1e-5)


def test_readers_take_over_exactly_what_a_coarse_gain_gave_up() -> None:
    """A Gemma gain of nearly -1 has few bits left; what rounding it loses must not be lost."""
    gain = torch.tensor([-0.97, 0.3, -1.0, 0.0], dtype=torch.bfloat16)
    w = Dense.of(torch.ones(1, 4))
    block = Block("block 0", {}, {"0.r": w}, {"0.r": w}, {"e": {}}, vectors={"0.n.weight": gain}, prefix="0.")
    scale = torch.tensor([1.37, 0.71, 2.0, 3.3])
    made = fold(block, Fold("e", ("r",), Norm("n.weight", "e", offset=1.0), None, 4), scale)
    product = (made.vectors["0.n.weight"].float() + 1) * made.weights["0.r"].unpack()[0]
    torch.testing.assert_close(product, gain.float() + 1, rtol=1e-6, atol=1e-7)


def test_scales_that_are_not_positive_are_refused() -> None:
    w = Dense.of(torch.ones(1, 2))
    block = Block("block 0", {}, {"0.r": w}, {"0.r": w}, {"e": {}}, vectors={"0.n.weight": torch.ones(2)}, prefix="0.")
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="block 0, e: scales must be positive"):
            fold(block, Fold("e", ("r",), Norm("n.weight", "e"), None, 2), torch.tensor([1.0, bad]))


def test_grouped_queries_share_what_one_row_writes() -> None:
    each = Fold("attn_mid", ("o",), None, "v", 8, repeats=2, head=2)
    scale = torch.tensor([1.0, 2.0, 4.0, 8.0, 3.0, 3.0, 3.0, 3.0])
    torch.testing.assert_close(each.rows(scale), torch.tensor([2.0, 4.0, 3.0, 3.0]))
    torch.testing.assert_close(each.tie(scale), torch.tensor([2.0, 4.0, 2.0, 4.0, 3.0, 3.0, 3.0, 3.0]))


AWQ = {"awq": {"bits": 4, "group_size": 8}}
LET = {"omniquant_let": {"bits": 4, "group_size": 8, "num_steps": 5}}


def test_norms_that_took_scales_are_saved(tmp_path: Path) -> None:
    base = make_base(tmp_path, "llama")
    result = run(base, tmp_path / "out", {"smoothquant": {}}, RTN)
    name = "model.layers.1.input_layernorm.weight"
    before = open_model(base).tensor(name)
    assert not torch.equal(open_model(result.folder).tensor(name), before)
    plain = run(base, tmp_path / "plain", RTN)
    assert result.nbytes == plain.nbytes
    assert result.errors.keys() == plain.errors.keys()
    shards = sorted(result.folder.glob("*.safetensors"))
    assert all(open_safetensors(shard).tensors for shard in shards)


@pytest.mark.parametrize("first", [{"smoothquant": {"alpha": 0.5}}, LET])
def test_rescaling_alone_leaves_the_error_at_rounding(tmp_path: Path, first: Settings) -> None:
    base = make_base(tmp_path, "llama")
    result = run(base, tmp_path / "out", first)
    assert result.errors
    assert max(result.errors.values()) < 1e-8


def test_later_steps_see_rescaled_inputs(tmp_path: Path) -> None:
    """GPTQ after a rescaling must use the rescaled Gram: with another it would be worse than without any."""
    base = make_base(tmp_path, "llama")
    scaled = run(base, tmp_path / "scaled", {"smoothquant": {"alpha": 0.5}}, GPTQ, data={"num_sequences": 16})
    rounded = run(base, tmp_path / "rounded", {"smoothquant": {"alpha": 0.5}}, RTN, data={"num_sequences": 16})
    blocks = [part for part in scaled.errors if part.startswith("block")]
    assert sum(scaled.errors[p] for p in blocks) < 0.8 * sum(rounded.errors[p] for p in blocks)


def test_what_is_compressed_already_cannot_be_rescaled(tmp_path: Path) -> None:
    base = make_base(tmp_path, "llama")
    for first in (RTN, WANDA):
        with pytest.raises(ValueError, match=r"only dense weights can be rescaled; put the rescaling step first"):
            run(base, tmp_path / "out", first, AWQ)
    stages = [{"blocks": [RTN]}, {"blocks": [AWQ]}]
    with pytest.raises(ValueError, match="only dense weights can be rescaled"):
        run(base, tmp_path / "out", stages=stages)


@pytest.mark.parametrize("first", [AWQ, LET])
def test_a_run_that_was_stopped_goes_on_alike(tmp_path: Path, first: Settings) -> None:
    base = make_base(tmp_path, "qwen2")
    whole = digests(run(base, tmp_path / "whole", first, GPTQ).folder)
    job = make_job(base, tmp_path / "again", first, GPTQ)

    class StopError(Exception):
        pass

    def stop(event: Any) -> None:
        if event.part == "block 1":
            raise StopError

    from decoct.engine.compress import compress_job
    from decoct.engine.job import Watch

    with pytest.raises(StopError):
        compress_job(job, Watch(event=stop))
    assert digests(compress_job(replace(job, model=open_model(base)), Watch()).folder) == whole

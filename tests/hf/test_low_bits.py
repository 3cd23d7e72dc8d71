"""Models of one to three bits a weight: sizes as planned, the same files each time, packed in transformers."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import decoct.hf  # noqa: F401 - registers the format
from decoct.engine.stages import plan_stages
from decoct.model import open_model
from tests.arch.test_families import our_logits
from tests.engine.running import Settings, digests, make_base, make_job, run

RECIPES: dict[str, tuple[list[Settings], set[str], bool]] = {
    "ternary": ([{"ternary": {"group_size": 8}}], {"Ternary"}, True),
    "ternary, no data, embedding too": (
        [{"match": ["embed", "lm_head", "*"], "ternary": {"group_size": 8, "feedback": False}}], {"Ternary"}, False
    ),
    "onebit": ([{"onebit": {}}], {"Binary"}, True),
    "onebit, no data, embedding too": (
        [{"match": ["embed", "lm_head", "*"], "onebit": {"num_rounds": 0}}], {"Binary"}, False
    ),
    "pb_llm": ([{"pb_llm": {"group_size": 16}}], {"Sum", "Binary", "SparseInt"}, True),
    "billm": ([{"billm": {"block_size": 20}}], {"Binary"}, True),
    "wanda, then ternary": (
        [{"wanda": {"sparsity": 0.3}}, {"ternary": {"group_size": 16}}], {"Masked", "Ternary"}, True
    ),
    "svd_llm, then billm": ([{"svd_llm": {"keep": 0.7}}, {"billm": {"block_size": 8}}], {"LowRank", "Binary"}, True),
    "onebit, then eora": ([{"onebit": {}}, {"eora": {"rank": 2}}], {"Sum", "Binary", "LowRank", "Dense"}, True),
}  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES)
@torch.no_grad()
def test_it_is_planned_repeated_and_loaded_packed(recipe: str, tmp_path: Path) -> None:
    steps, kinds, needs_data = RECIPES[recipe]
    blocks = [{"linear": step} for step in steps]
    base = make_base(tmp_path)
    job = make_job(base, tmp_path / "out", *blocks)
    (plan,) = plan_stages(job.model, job.stages, job.data, job.budget, job.out).stages
    assert plan.needs_data == needs_data
    out = run(base, tmp_path / "out", *blocks).folder
    assert digests(run(base, tmp_path / "again", *blocks).folder) == digests(out)
    model = open_model(out)
    assert plan.output_bytes == pytest.approx(model.nbytes, rel=0.12)
    weights = [model.weight(name) for name in model.described]
    assert len(weights) == 3 * 7 + ("embedding" in recipe) * 2
    assert {node.kind for weight in weights for node in weight.walk()} == kinds
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    tokens = torch.randint(3, 60, (2, 24), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(loaded(tokens).logits, our_logits(model, tokens), rtol=1e-4, atol=1e-5)
    held = sum(t.nbytes for t in (*loaded.buffers(), *loaded.parameters()))
    assert held < 0.6 * open_model(base).nbytes

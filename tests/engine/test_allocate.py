"""OWL: blocks with more outlying weights keep more of them, and all blocks together as many as was asked for."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from decoct.engine.compress import compress_job
from decoct.engine.job import Watch
from decoct.engine.stages import plan_stages
from decoct.model import Model, open_model
from decoct.ops.outlier_share import outlier_share, spread_sparsities
from decoct.recipe import RecipeError, parse_recipe
from tests.engine.running import Crash, crash_at, digests, make_base, make_job, run

OWL: dict[str, Any] = {"linear": {"wanda": {"sparsity": 0.6, "owl": 0.1}}}


def test_shares_follow_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.randn(7, 9, generator=generator), torch.randn(5, 9, generator=generator)]
    norms = [torch.rand(9, generator=generator) * 4, torch.rand(9, generator=generator)]
    scores = [
        abs(float(w[i, j])) * float(norm[j])
        for w, norm in zip(matrices, norms, strict=True)
        for i in range(w.shape[0])
        for j in range(w.shape[1])
    ]
    count = sum(score > 2.0 * sum(scores) / len(scores) for score in scores)
    assert count > 0
    assert outlier_share(matrices, norms, times=2.0) == count / (7 * 9 + 5 * 9)


def test_a_matrix_that_stands_out_as_a_whole_is_outlying() -> None:
    """The mean is the block's: in its own matrix no weight stands out from others of the same size."""
    matrices, norms = [torch.ones(10, 9), torch.full((1, 9), 100.0)], [torch.ones(9), torch.ones(9)]
    assert outlier_share(matrices, norms) == 1 / 11


def test_sparsities_average_to_what_was_asked_and_lie_within_the_spread() -> None:
    shares = [0.01, 0.05, 0.02, 0.09]
    found = spread_sparsities(shares, 0.7, 0.08)
    assert sum(found) / 4 == pytest.approx(0.7)
    assert max(found) - min(found) == pytest.approx(0.16)
    assert sorted(range(4), key=found.__getitem__) == [3, 1, 2, 0], "most outlying weights, least sparsity"
    assert spread_sparsities([0.1, 0.1], 0.7, 0.08) == [0.7, 0.7]


def sparsities(model: Model) -> list[float]:
    """Of every block."""
    found = []
    for block in range(model.num_blocks):
        matrices = [model.weight(model.prefix(block) + slot.name).unpack() for slot in model.block_slots]
        found.append(sum(int((m == 0).sum()) for m in matrices) / sum(m.numel() for m in matrices))
    return found


def test_blocks_are_pruned_by_their_outliers(tmp_path: Path) -> None:
    base = make_base(tmp_path)
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        reference.model.layers[1].mlp.gate_proj.weight[:4] *= 30  # rows that stand out
    reference.save_pretrained(base)
    made = sparsities(open_model(run(base, tmp_path / "out", OWL).folder))
    assert made[1] < min(made[0], made[2])
    assert sum(made) / 3 == pytest.approx(0.6, abs=0.02)
    alike = sparsities(open_model(run(base, tmp_path / "alike", {"linear": {"wanda": {"sparsity": 0.6}}}).folder))
    assert max(alike) - min(alike) < 0.01


def test_a_method_without_data_needs_it_for_the_allocation(tmp_path: Path) -> None:
    base = make_base(tmp_path)
    job = make_job(base, tmp_path / "out", {"linear": {"magnitude": {"sparsity": 0.5, "owl": 0.08}}})
    plan = plan_stages(job.model, job.stages, job.data, job.budget, None)
    assert plan.needs_data
    made = sparsities(open_model(compress_job(job, Watch()).folder))
    assert max(made) - min(made) > 0.05


def test_a_rule_for_some_blocks_meets_its_sparsity_in_these(tmp_path: Path) -> None:
    base = make_base(tmp_path)
    step = {"linear": [{"match": ["0.*", "2.*"], "wanda": {"sparsity": 0.6, "owl": 0.1}}]}
    made = sparsities(open_model(run(base, tmp_path / "out", step).folder))
    assert made[1] == 0
    assert (made[0] + made[2]) / 2 == pytest.approx(0.6, abs=0.02)
    assert abs(made[0] - made[2]) == pytest.approx(0.2, abs=0.02)


def test_a_guided_method_is_allocated_too(tmp_path: Path) -> None:
    base = make_base(tmp_path)
    step = {"linear": {"sparsegpt": {"sparsity": 0.5, "owl": 0.1, "guided": 2}}}
    made = sparsities(open_model(run(base, tmp_path / "out", step).folder))
    assert max(made) - min(made) > 0.05


def test_a_killed_run_gives_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from decoct.engine import stream

    base = make_base(tmp_path)
    whole = digests(run(base, tmp_path / "whole", OWL).folder)
    with monkeypatch.context() as patch:
        patch.setattr(stream, "write_shard", crash_at(2, stream.write_shard))
        with pytest.raises(Crash):
            run(base, tmp_path / "out", OWL)
    assert len(json.loads((tmp_path / "out/.run/stage-0/outliers.json").read_text())["shares"]) == 3
    assert digests(run(base, tmp_path / "out", OWL).folder) == whole


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"sparsity": 0.1, "owl": 0.08}, "does not fit between no and all weights"),
        ({"sparsity": 0.5, "owl": -0.1}, "does not fit between no and all weights"),
        ({"n": 2, "m": 4, "owl": 0.08}, "leave owl out"),
    ],
)
def test_impossible_spreads_are_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        parse_recipe({"stages": [{"blocks": [{"linear": {"wanda": settings}}]}]})

"""Methods of different families in one recipe: rotations, rounded inputs, tuning, cache policies, exports, searches."""

from pathlib import Path
from typing import Any

import pytest
import torch

from decoct.engine.compress import compress_job
from decoct.engine.job import Watch
from decoct.exporters import export_model
from decoct.model import open_model
from tests.engine.running import EORA, GPTQ, RTN, Crash, crash_at, digests, make_base, make_job, run, whole

INPUTS: dict[str, Any] = {"linear": {"inputs": {"bits": 8}}}
KIVI: dict[str, Any] = {"cache": {"kivi": {"group_size": 8}}}
TUNING: dict[str, Any] = {"e2e_qp": {"num_steps": 2}}


def refusal(base: Path, out: Path, stages: list[dict[str, Any]]) -> str:
    job = make_job(base, out, stages=stages)
    with pytest.raises(ValueError, match=r"\w") as refused:
        compress_job(job, Watch())
    assert not out.exists() or not any(out.iterdir()), "refused before anything is written"
    return str(refused.value)


def test_a_rotation_with_a_list_of_roles_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base(tmp_path)
    steps = ({"quarot": {"online": ["mlp.down", "attn.o"]}}, GPTQ)
    with monkeypatch.context() as patch:
        from decoct.engine.journal import Journal

        patch.setattr(Journal, "finish", crash_at(2, Journal.finish))
        with pytest.raises(Crash):
            run(base, tmp_path / "out", *steps)
    assert digests(run(base, tmp_path / "out", *steps).folder) == whole(base, *steps)


def test_four_stages_meet_their_plan(tmp_path: Path) -> None:
    from decoct.engine.stages import plan_stages

    base = make_base(tmp_path)
    stages = [{"blocks": [{"quarot": {}}, RTN]}, TUNING, {"blocks": [INPUTS]}, KIVI]
    job = make_job(base, tmp_path / "out", stages=stages)
    planned = plan_stages(job.model, job.stages, job.data, job.budget, None).output_bytes
    made = open_model(compress_job(job, Watch()).folder)
    assert made.nbytes == planned
    assert made.cache is not None
    assert made.weight("model.layers.0.mlp.down_proj.weight").quantizes_inputs


def test_inputs_after_a_correction_of_rotated_matrices_are_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path)
    said = refusal(base, tmp_path / "out", [{"blocks": [{"quarot": {}}, RTN, EORA, INPUTS]}])
    assert "put inputs before the correction" in said
    run(base, tmp_path / "out", {"quarot": {}}, RTN, INPUTS, EORA)


def test_tuning_leaves_alone_what_is_only_rotated(tmp_path: Path) -> None:
    base = make_base(tmp_path)
    rules = [{"match": "mlp.down", "leave": True}, {"match": "*", "rtn": {"bits": 4, "group_size": 8}}]
    blocks = {"blocks": [{"quarot": {}}, {"linear": rules}]}
    name = "model.layers.1.mlp.down_proj.weight"
    before, after = (
        open_model(run(base, tmp_path / label, stages=stages).folder).weight(name).unpack()
        for label, stages in (("rounded", [blocks]), ("tuned", [blocks, TUNING]))
    )
    assert torch.equal(before, after)


def test_a_rotation_alone_leaves_nothing_to_tune(tmp_path: Path) -> None:
    said = refusal(make_base(tmp_path), tmp_path / "out", [{"blocks": [{"quarot": {}}]}, TUNING])
    assert "no stage before it compresses anything" in said


def test_a_rotated_model_keeps_its_cache_policy(tmp_path: Path) -> None:
    base = make_base(tmp_path)
    kept = run(base, tmp_path / "cached", stages=[KIVI]).folder
    policy = open_model(kept).cache
    assert policy is not None
    (kept.parent / "text.txt").touch()
    assert open_model(run(kept, tmp_path / "out", {"quarot": {}}, RTN).folder).cache == policy


def test_rescaling_what_is_rotated_names_a_way_out(tmp_path: Path) -> None:
    base, smooth = make_base(tmp_path), {"smoothquant": {}}
    said = refusal(base, tmp_path / "out", [{"blocks": [{"quarot": {}}, smooth, RTN]}])
    assert "set online: false" in said
    run(base, tmp_path / "out", {"quarot": {"online": False}}, smooth, RTN)


def test_a_refused_export_leaves_no_folder(tmp_path: Path) -> None:
    base = make_base(tmp_path)
    model = open_model(run(base, tmp_path / "out", RTN, INPUTS).folder)
    with pytest.raises(ValueError, match=r"inputs of model\.layers\.0.* are rounded; add --fold"):
        export_model(model, "dense", tmp_path / "dense")
    export_model(model, "dense", tmp_path / "dense", fold=True)
    assert open_model(tmp_path / "dense").described == {}


STRUCTURE: dict[str, list[dict[str, Any]]] = {
    "depth": [{"shortgpt": {"num_dropped": 1}}],
    "sublayers": [{"blockpruner": {"num_dropped": 1}}],
    "width": [{"ziplm": {"keep": 0.85, "multiple_of": 8}}],
    "channels": [{"slicegpt": {"keep": 0.75, "multiple_of": 8}}],
    "depth, then width": [{"sleb": {"num_dropped": 1}}, {"flap": {"keep": 0.9, "multiple_of": 8}}],
    "nothing": [],
}
SINGLE: dict[str, list[dict[str, Any]]] = {
    "wanda": [{"linear": {"wanda": {"sparsity": 0.5}}}],
    "sparsegpt 2:4": [{"linear": {"sparsegpt": {"n": 2, "m": 4}}}],
    "alps": [{"linear": {"alps": {"sparsity": 0.6}}}],
    "wanda, dsnot": [{"linear": {"wanda": {"sparsity": 0.5}}}, {"linear": {"dsnot": {}}}],
}


@pytest.mark.parametrize("single", SINGLE)
@pytest.mark.parametrize("structure", STRUCTURE)
def test_quantization_keeps_two_prunings_weight_by_weight(structure: str, single: str, tmp_path: Path) -> None:
    """The shapes of the first, the zeros of the second, 4 bits in what is left."""
    base = make_base(tmp_path)
    stages = [*STRUCTURE[structure], {"blocks": SINGLE[single]}]
    before = open_model(run(base, tmp_path / "pruned", stages=stages).folder)
    after = open_model(run(tmp_path / "pruned", tmp_path / "small", GPTQ).folder)
    assert set(after.described) == set(before.described)
    for name in before.described:
        pruned, made = before.weight(name), after.weight(name)
        zeros = pruned.unpack() == 0
        assert zeros.float().mean() > 0.4, name
        assert made.shape == pruned.shape
        assert not made.unpack()[zeros].any(), name
        assert made.nbytes < pruned.nbytes or zeros.all()

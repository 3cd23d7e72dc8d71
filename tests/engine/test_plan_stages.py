"""All stages are planned before the first one runs: what would stop a later one stops the run in the first second."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import decoct
from decoct.engine import disk, tune
from decoct.engine import stages as stages_module
from decoct.engine.budget import planning_as_at, resident_bytes
from decoct.engine.job import Watch
from decoct.engine.plan_tuning import plan_tuning
from decoct.engine.stages import RecipePlan, plan_stages
from decoct.engine.stream import Event
from decoct.methods.quantize.e2e_qp import E2EQP
from decoct.model import Model, open_model
from decoct.weights import trainable
from tests.engine.running import EORA, EVERYTHING, GPTQ, RTN, WANDA, Crash, Settings, digests, make_base, make_job, run
from tests.engine.test_plan import untouched
from tests.engine.test_resume import spy

TUNE: Settings = {"e2e_qp": {"num_steps": 3}}
TUNED = [{"blocks": [RTN]}, TUNE]


def planned(base: Path, out: Path | None, stages: list[Settings], **changes: Any) -> RecipePlan:
    job = make_job(base, out or Path(), stages=stages, **changes)
    return plan_stages(job.model, job.stages, job.data, job.budget, out)


@pytest.fixture
def constant_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("plan", "plan_tuning"):
        monkeypatch.setattr(f"decoct.engine.{module}.resident_bytes", lambda: 1 << 28)


@pytest.mark.usefixtures("constant_memory")
def test_a_model_too_large_to_tune_is_refused_before_it_is_streamed(tmp_path: Path) -> None:
    base = make_base(tmp_path, vocab_size=8192, max_position_embeddings=512)
    data = {"num_sequences": 1, "sequence_length": 512}
    streamed, tuned = planned(base, tmp_path / "out", TUNED, data=data).stages
    assert streamed.peak_bytes < tuned.peak_bytes
    before = untouched(tmp_path)
    budget = {"host": tuned.peak_bytes - 1}
    planned(base, tmp_path / "out", TUNED[:1], data=data, budget=budget)
    message = r"e2e_qp holds the whole model in memory: .*base needs about .*raise"
    with pytest.raises(ValueError, match=message) as caught:
        run(base, tmp_path / "out", stages=TUNED, data=data, budget=budget)
    assert "at a time" not in str(caught.value)
    assert untouched(tmp_path) == before


LATE: dict[str, tuple[list[Settings], Settings, str]] = {
    "sequences that are too long": (TUNED, {"sequence_length": 65}, "more than the model's limit of 64 tokens"),
    "a text that is not there": (TUNED, {"source": "nowhere.txt"}, r"nowhere\.txt does not exist"),
    "the same for a later pass": ([{"blocks": [RTN]}, {"blocks": [EORA]}], {}, "in the same stage"),
    "a later pass without its text": (
        [{"blocks": [{"linear": {"match": "attn.q", "rtn": {"group_size": 8}}}]}, {"blocks": [WANDA]}],
        {"source": "nowhere.txt"},
        r"nowhere\.txt does not exist",
    ),
    "nothing before it": ([TUNE], {}, "e2e_qp has nothing to tune: no stage before it compresses anything"),
    "nothing compressed before it": (
        [{"blocks": [{"linear": {"match": "attn.q", "leave": True}}]}, TUNE], {}, "e2e_qp has nothing to tune",
    ),
    "a first stage that is tuning": ([TUNE, {"blocks": [RTN]}], {}, "e2e_qp has nothing to tune"),
}  # fmt: skip


@pytest.mark.parametrize("why", LATE)
def test_what_would_stop_a_later_stage_is_said_at_once(why: str, base: Path, tmp_path: Path) -> None:
    stages, data, message = LATE[why]
    before = untouched(tmp_path)
    with pytest.raises(ValueError, match=message):
        planned(base, tmp_path / "out", stages, data=data)
    with pytest.raises(ValueError, match=message):
        run(base, tmp_path / "out", stages=stages, data=data)
    assert untouched(tmp_path) == before


def test_a_text_that_is_too_short_is_noticed_before_the_first_shard(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = spy(monkeypatch)
    with pytest.raises(ValueError, match=r"set data\.num_sequences=\d+ or take a longer text"):
        run(base, tmp_path / "out", stages=TUNED, data={"num_sequences": 100_000})
    assert not written


def test_a_compressed_model_is_not_tuned_against_itself(base: Path, tmp_path: Path) -> None:
    compressed = run(base, tmp_path / "first", RTN).folder
    text = {"source": str(base.parent / "text.txt")}
    with pytest.raises(ValueError, match=r"first is compressed already, and e2e_qp would compare it with itself; put"):
        run(compressed, tmp_path / "out", stages=[TUNE], data=text)
    assert not (tmp_path / "out").exists()
    further = [{"blocks": [{"linear": {"match": ["embed", "lm_head"], "rtn": {"group_size": 8}}}]}, TUNE]
    result = run(compressed, tmp_path / "out", stages=further, data=text)
    assert result.losses[0] > 0


def test_shared_weights_are_refused(base: Path) -> None:
    job = make_job(base, Path(), stages=TUNED)
    owner, reader = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
    shared = {"kind": "Shared", "shape": [48, 32], "dtype": {"dtype": "float32"}, "target": owner}
    model = replace(job.model, described={reader: shared})
    earlier = plan_stages(job.model, job.stages[:1], job.data, job.budget, None).stages
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight is shared with another matrix"):
        plan_tuning(model, model, E2EQP(), job.data, job.budget, earlier)


FIRST: dict[str, tuple[Settings, ...]] = {
    "quantized": (EVERYTHING,),
    "asymmetric": ({"linear": {"rtn": {"bits": 3, "group_size": 16, "symmetric": False}}},),
    "pruned": (WANDA,),
    "pruned and quantized": (WANDA, GPTQ),
    "factors": ({"linear": {"svd_llm": {"keep": 0.7}}},),
    "corrected": (GPTQ, EORA),
    "learned": ({"autoround": {"bits": 4, "group_size": 8, "num_steps": 2}},),
}


@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("name", ["llama", "llama-tied", "mixtral"])
def test_what_there_is_to_tune_is_predicted(first: str, name: str, tmp_path: Path) -> None:
    base = make_base(tmp_path, name)
    stages = [{"blocks": list(FIRST[first])}, TUNE]
    streamed, tuned = planned(base, None, stages).stages
    result = run(base, tmp_path / "out", *FIRST[first])
    made = open_model(result.folder)
    assert streamed.reals.keys() == made.described.keys()
    actual = sum(tensor.numel() for slot in made.described for tensor in trainable(made.weight(slot)).values())
    assert sum(streamed.reals.values()) == pytest.approx(actual, rel=0.1)
    assert tuned.output_bytes == streamed.output_bytes == pytest.approx(result.nbytes, rel=0.1)
    vectors = sum(made.tensor(n).numel() for b in (None, 0, 1, 2) for n in made.others(b))
    assert tuned.checkpoint_bytes == 24 * (sum(streamed.reals.values()) + vectors)
    (group,) = tuned.groups
    assert (group.count, group.methods) == (len(made.described), (E2EQP(num_steps=3),))
    assert tuned.kind == "e2e_qp"


def test_a_second_pass_counts_with_what_the_first_one_makes(base: Path, tmp_path: Path) -> None:
    """Its size is that of both passes' work, and shapes are those that the first one leaves."""
    stages = [{"blocks": [WANDA]}, {"blocks": [GPTQ, EORA]}]
    found = planned(base, tmp_path / "out", stages)
    events: list[Event] = []
    result = run(base, tmp_path / "out", stages=stages, watch=Watch(event=events.append))
    sizes = [sum(event.nbytes for event in each) for each in (events[:5], events[5:])]
    assert [plan.output_bytes for plan in found.stages] == pytest.approx(sizes, rel=0.1)
    assert found.output_bytes == pytest.approx(result.nbytes, rel=0.1)
    methods = [{len(group.methods) for group in plan.groups} for plan in found.stages]
    assert methods == [{0, 1}, {0, 2}]


def test_planning_reads_no_weights(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compressed = run(base, tmp_path / "out", RTN).folder

    def refuse(*_: object) -> None:
        raise AssertionError("a weight is read")

    for name in ("weight", "tensor"):
        monkeypatch.setattr(Model, name, refuse)
    planned(base, None, [{"blocks": [EVERYTHING]}, TUNE])
    more = {"linear": {"match": ["embed", "lm_head"], "rtn": {"group_size": 8}}}
    text = {"source": str(base.parent / "text.txt")}
    found = planned(compressed, None, [{"blocks": [more]}, TUNE], data=text).stages[1]
    assert len(found.reals) == 21 + 2
    assert found.reals["model.layers.0.mlp.down_proj.weight"] == 32 * 48 // 8


# Disk


def test_disk_of_all_stages(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every result stays until the end; activations are of one stage, checkpoints of another."""
    found = planned(base, tmp_path / "out", [{"blocks": [GPTQ]}, TUNE])
    first, second = found.stages
    assert first.scratch_bytes > 0
    assert first.checkpoint_bytes == second.scratch_bytes == 0
    needed = max(first.output_bytes + first.scratch_bytes, 2 * first.output_bytes + second.checkpoint_bytes)
    assert found.disk_bytes == needed
    for free in (needed, needed - 1):
        monkeypatch.setattr(disk, "free_bytes", lambda _, free=free: free)
        if free == needed:
            planned(base, tmp_path / "out", [{"blocks": [GPTQ]}, TUNE])
        else:
            with pytest.raises(ValueError, match=r"out needs about .* of disk"):
                planned(base, tmp_path / "out", [{"blocks": [GPTQ]}, TUNE])


def test_checkpoints_lie_in_the_output_folder_and_activations_elsewhere(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages, budget = [{"blocks": [GPTQ]}, TUNE], {"scratch": str(tmp_path / "scratch")}
    first, second = planned(base, None, stages, budget=budget).stages
    monkeypatch.setattr(disk, "_device", lambda path: path.name == "scratch")
    room = {"out": 2 * first.output_bytes + second.checkpoint_bytes, "scratch": first.scratch_bytes}
    monkeypatch.setattr(disk, "free_bytes", lambda path: room[path.name])
    planned(base, tmp_path / "out", stages, budget=budget)
    for place in room:
        room[place] -= 1
        with pytest.raises(ValueError, match=f"{place} needs about .* of disk"):
            planned(base, tmp_path / "out", stages, budget=budget)
        room[place] += 1


def stopped(base: Path, out: Path, events: int, stages: list[Settings]) -> None:
    """A run that was cut off at this event."""
    left = iter(range(events, -1, -1))

    def event(_: Event) -> None:
        if next(left) == 0:
            raise Crash

    with pytest.raises(Crash):
        run(base, out, stages=stages, watch=Watch(event=event))


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "_SAVE_SECONDS", 0.0)


@pytest.mark.usefixtures("often")
def test_only_what_replaces_later_writes_counts_as_written(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first stage's result is no part of the second's; its old checkpoint is, of its two."""
    stopped(base, tmp_path / "out", 5 + 1, TUNED)
    (tmp_path / "out" / "notes.txt").write_text("x" * 100_000)
    _, second = planned(base, None, TUNED).stages
    checkpoint = tmp_path / "out" / ".run" / "stage-1" / "tuning.safetensors"
    assert second.checkpoint_bytes / 2 < checkpoint.stat().st_size < second.checkpoint_bytes / 2 + 30_000
    needed = second.output_bytes + max(0, second.checkpoint_bytes - checkpoint.stat().st_size)
    monkeypatch.setattr(disk, "free_bytes", lambda _: needed - 1)
    with pytest.raises(ValueError, match=r"out needs about .* of disk"):
        run(base, tmp_path / "out", stages=TUNED)
    monkeypatch.setattr(disk, "free_bytes", lambda _: needed)
    run(base, tmp_path / "out", stages=TUNED)


def test_finished_shards_and_activations_count_as_written(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = [{"blocks": [GPTQ]}]
    stopped(base, tmp_path / "out", 2, stages)
    (plan,) = planned(base, None, stages).stages
    folder = tmp_path / "out" / ".run" / "stage-0"
    shards = sum(path.stat().st_size for path in folder.glob("model-*"))
    states = sum(path.stat().st_size for path in folder.glob("*.bin"))
    assert states == plan.scratch_bytes // 2
    needed = plan.output_bytes - shards + states
    monkeypatch.setattr(disk, "free_bytes", lambda _: needed - 1)
    with pytest.raises(ValueError, match="of disk"):
        run(base, tmp_path / "out", stages=stages)
    monkeypatch.setattr(disk, "free_bytes", lambda _: needed)
    run(base, tmp_path / "out", stages=stages)


def test_fresh_counts_with_what_goes(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(base, tmp_path / "out", RTN)
    there = sum(path.stat().st_size for path in result.folder.rglob("*") if path.is_file())
    plan = planned(base, None, TUNED)
    monkeypatch.setattr(disk, "free_bytes", lambda _: plan.disk_bytes - there - 1)
    with pytest.raises(ValueError, match="of disk"):
        run(base, tmp_path / "out", stages=TUNED, fresh=True)
    monkeypatch.setattr(disk, "free_bytes", lambda _: plan.disk_bytes - there)
    run(base, tmp_path / "out", stages=TUNED, fresh=True)


def test_activations_go_when_their_stage_is_over(base: Path, tmp_path: Path) -> None:
    stopped(base, tmp_path / "out", 5, [{"blocks": [GPTQ]}, TUNE])
    assert not list((tmp_path / "out").rglob("*.bin"))
    assert (tmp_path / "out" / ".run" / "result-0" / "config.json").exists()
    assert (tmp_path / "out" / ".run" / "stage-1" / "journal.jsonl").exists()


# What is shown


def test_plan_of_a_whole_recipe(base: Path) -> None:
    recipe = {"data": {"num_sequences": 4, "sequence_length": 16}, "stages": [{"blocks": [GPTQ]}, TUNE]}
    found = decoct.plan(base, recipe)
    assert [plan.kind for plan in found.stages] == ["blocks", "e2e_qp"]
    assert found.peak_bytes == max(plan.peak_bytes for plan in found.stages)
    assert found.seconds == sum(plan.seconds for plan in found.stages)
    assert found.output_bytes == found.stages[1].output_bytes
    assert found.bits_per_weight == pytest.approx(8 * found.output_bytes / found.num_parameters)
    assert found.needs_data
    assert not decoct.plan(base, {"stages": [{"blocks": [RTN]}]}).needs_data


def test_every_stage_keeps_what_it_began_to_compute_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base(tmp_path, dtype=torch.bfloat16)
    for module in ("plan", "plan_tuning"):
        monkeypatch.setattr(f"decoct.engine.{module}.compute_dtype", lambda _: torch.float32)
    expected = digests(run(base, tmp_path / "whole", stages=TUNED).folder)
    stopped(base, tmp_path / "out", 5 + 1, TUNED)
    monkeypatch.setattr("decoct.engine.plan_tuning.compute_dtype", lambda _: torch.bfloat16)
    assert digests(run(base, tmp_path / "out", stages=TUNED).folder) == expected
    shutil.rmtree(tmp_path / "out")
    other = run(base, tmp_path / "out", stages=TUNED).folder
    lineage = json.loads((other / "decoct.json").read_text())["lineage"]
    assert lineage[1]["compute_dtype"] == "bfloat16"


def test_what_a_run_has_loaded_is_not_counted_twice() -> None:
    now = resident_bytes()
    with planning_as_at(now // 2):
        assert resident_bytes() == now // 2
    with planning_as_at(2 * now):
        assert resident_bytes() < 2 * now
    assert resident_bytes() > now // 2


def test_a_later_stage_is_planned_again_with_the_first_model_as_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_base(tmp_path)
    seen: list[int] = []
    plan = stages_module.plan_tuning

    def listen(model: Model, teacher: Model, *rest: Any) -> Any:
        seen.append(teacher.num_blocks)
        return plan(model, teacher, *rest)

    monkeypatch.setattr(stages_module, "plan_tuning", listen)
    blocks = open_model(base).num_blocks
    tuned = [{"shortgpt": {"num_dropped": 1}}, {"blocks": [RTN]}, {"e2e_qp": {"num_steps": 1, "batch_size": 1}}]
    run(base, tmp_path / "out", stages=tuned)
    assert seen == [blocks, blocks], "planned at first, and again when it shows which blocks are left"

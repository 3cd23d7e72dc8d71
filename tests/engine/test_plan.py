"""The plan tells the truth, and everything that would stop the run later stops it before a byte is written."""

from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch

from decoct.engine.budget import Budget, format_size, parse_size
from decoct.engine.job import Job
from decoct.engine.plan import Plan
from decoct.engine.stages import plan_stages
from decoct.engine.write import finish_folder
from decoct.methods.quantize.lrq import LRQ
from decoct.model import open_model
from tests.engine.running import (
    AUTOROUND,
    EORA,
    EVERYTHING,
    GPTQ,
    RTN,
    WANDA,
    Crash,
    Settings,
    crash_at,
    make_base,
    make_job,
    run,
)


def planned(job: Job) -> Plan:
    """The only stage's plan."""
    (plan,) = plan_stages(job.model, job.stages, job.data, job.budget, job.out).stages
    return plan


def quantize(method: str, **settings: Any) -> Settings:
    return {"linear": {method: {"group_size": 8, **settings}}}


SCHEMES = {
    "rtn": quantize("rtn"),
    "rtn, asymmetric": quantize("rtn", symmetric=False, bits=3, group_size=16),
    "rtn, channel": quantize("rtn", bits=8, group_size="channel"),
    "rtn, channel, asymmetric": quantize("rtn", bits=8, group_size="channel", symmetric=False),
    "rtn, tensor": quantize("rtn", bits=8, group_size="tensor"),
    "gptq": quantize("gptq", bits=4),
    "gptq, 5 bits, channel": quantize("gptq", bits=5, group_size="channel"),
    "embedding and lm_head too": EVERYTHING,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_predicted_size_is_the_size(scheme: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base = make_base(tmp_path, "llama", dtype)
    job = make_job(base, tmp_path / "out", SCHEMES[scheme])
    plan = planned(job)
    result = run(base, tmp_path / "out", SCHEMES[scheme])
    assert result.nbytes == sum(body_bytes(path) for path in result.folder.glob("*.safetensors"))
    assert plan.output_bytes == pytest.approx(result.nbytes, rel=0.01)
    assert plan.bits_per_weight == pytest.approx(result.bits_per_weight, rel=0.01)


def body_bytes(shard: Path) -> int:
    return shard.stat().st_size - 8 - int.from_bytes(shard.read_bytes()[:8], "little")


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "llama-tied"])
def test_predicted_size_for_other_families(name: str, tmp_path: Path) -> None:
    base = make_base(tmp_path, name)
    plan = planned(make_job(base, tmp_path / "out", RTN))
    assert plan.output_bytes == pytest.approx(run(base, tmp_path / "out", RTN).nbytes, rel=1e-3)


@pytest.mark.parametrize("steps", [(WANDA,), (WANDA, GPTQ), (GPTQ, EORA), ({"linear": {"svd_llm": {"keep": 0.7}}},)])
def test_predicted_size_of_other_methods_is_close(steps: tuple[Settings, ...], tmp_path: Path) -> None:
    """Ranks and sparse counts are rounded for each shape; the rehearsal knows one shape."""
    base = make_base(tmp_path)
    plan = planned(make_job(base, tmp_path / "out", *steps))
    assert plan.output_bytes == pytest.approx(run(base, tmp_path / "out", *steps).nbytes, rel=0.1)


def test_groups_say_what_happens(base: Path, tmp_path: Path) -> None:
    rules = [{"match": "mlp.*", "leave": True}, {"gptq": {"group_size": 8}}]
    plan = planned(make_job(base, tmp_path / "out", {"linear": rules}))
    happens = {group.role: (group.count, len(group.methods)) for group in plan.groups}
    attention = {f"attn.{x}": (3, 1) for x in "qkvo"}
    mlp = {f"mlp.{x}": (3, 0) for x in ("gate", "up", "down")}
    assert happens == {"embed": (1, 0), **attention, **mlp, "lm_head": (1, 0)}
    assert sum(group.parameters for group in plan.groups) < plan.num_parameters
    assert plan.needs_data
    assert not planned(make_job(base, tmp_path / "out", RTN)).needs_data


def rule(**settings: Any) -> Settings:
    return {"linear": settings}


REFUSED = {
    "a group size that does not divide": (
        [quantize("gptq", group_size=32)],
        r"layers\.0\.mlp\.down_proj\.weight: group_size 32 does not divide 48 .*; use channel or 4 or 8 or 16$",
    ),
    "factorizing what is quantized": ([GPTQ, rule(svd_llm={})], "svd_llm cannot be applied to a GroupInt weight"),
    "quantizing twice": ([RTN, GPTQ], "gptq cannot be applied to a GroupInt weight"),
    "pruning what is factorized": ([rule(svd_llm={"keep": 0.8}), WANDA], "wanda cannot be applied to a LowRank"),
    "a rule that matches nothing": (
        [rule(match="mlp.gate_up", gptq={"group_size": 8})],
        r"rule 'mlp\.gate_up' matches nothing; this model's roles: attn\.k, .*mlp\.up",
    ),
    "data for an embedding": ([rule(match="embed", gptq={"group_size": 8})], r"embed_tokens\.weight: an embedding has"),
    "learning the rounding of nothing": ([{"autoround": {}}], "autoround finds nothing quantized; give it bits"),
    "learning the rounding of what is pruned": ([WANDA, {"autoround": {}}], "autoround finds nothing quantized"),
    "rounding a corrected matrix": (
        [WANDA, EORA, {"autoround": {"bits": 4, "group_size": 8}}],
        r"autoround cannot be applied to a Sum\(Sparse, LowRank",
    ),
    "groups that do not divide what is to be rounded": (
        [{"autoround": {"bits": 4, "group_size": 32}}],
        r"mlp\.down_proj\.weight: group_size 32 does not divide 48",
    ),
    "correcting nothing": ([EORA], "a correction needs an earlier step that compresses"),
    "a rank larger than the matrix": ([RTN, rule(eora={"rank": 17})], r"k_proj\.weight: rank 17 is more than"),
    "a rank to learn in larger than the matrix": (
        [RTN, {"lrq": {"rank": 9}}],
        r"k_proj\.weight: lrq: rank 9 is too much for a 16x32 matrix; give at most 8",
    ),
    "the same, rounded by the step itself": (
        [{"lrq": {"bits": 4, "group_size": 8, "rank": 100000}}],
        r"_proj\.weight: lrq: rank 100000 is too much for a \d+x32 matrix; give at most 16",
    ),
    "a pattern that does not divide": ([rule(wanda={"n": 2, "m": 5})], "2:5 does not divide 32 input features"),
}


def untouched(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


@pytest.mark.parametrize("why", REFUSED)
def test_refused_before_anything_is_written(why: str, base: Path, tmp_path: Path) -> None:
    steps, message = REFUSED[why]
    before = untouched(tmp_path)
    with pytest.raises(ValueError, match=message):
        planned(make_job(base, tmp_path / "out", *steps))
    with pytest.raises(ValueError, match=message):
        run(base, tmp_path / "out", *steps)
    assert untouched(tmp_path) == before


def test_too_little_memory(base: Path, tmp_path: Path) -> None:
    before = untouched(tmp_path)
    with pytest.raises(ValueError, match=r"needs about .*the budget allows 1\.0 MiB; raise budget\.host"):
        run(base, tmp_path / "out", GPTQ, budget={"host": "1MiB"})
    assert untouched(tmp_path) == before


def test_too_little_disk(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = untouched(tmp_path)
    monkeypatch.setattr("decoct.engine.disk.free_bytes", lambda _: 1000)
    with pytest.raises(ValueError, match=r"out needs about .* of disk, 1000 B are free; free some, or choose another"):
        run(base, tmp_path / "out", GPTQ)
    assert untouched(tmp_path) == before


def test_disk_counts_what_lies_where(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned(make_job(base, tmp_path / "out", GPTQ))
    assert plan.scratch_bytes == 2 * 4 * 16 * 32 * 4
    monkeypatch.setattr("decoct.engine.disk.free_bytes", lambda _: plan.output_bytes + plan.scratch_bytes)
    scratch = {"scratch": str(tmp_path / "scratch")}
    for budget in ({}, scratch):
        planned(make_job(base, tmp_path / "out", GPTQ, budget=budget))
    monkeypatch.setattr("decoct.engine.disk.free_bytes", lambda _: plan.output_bytes + plan.scratch_bytes - 1)
    for budget in ({}, scratch):  # the scratch folder is on the same disk
        with pytest.raises(ValueError, match="of disk"):
            planned(make_job(base, tmp_path / "out", GPTQ, budget=budget))


def test_a_run_that_has_its_room_may_resume(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an unfinished run has written already need not be free a second time."""
    plan = planned(make_job(base, tmp_path / "out", RTN))

    monkeypatch.setattr("decoct.engine.compress.finish_folder", crash_at(0, finish_folder))
    with pytest.raises(Crash):
        run(base, tmp_path / "out", RTN)
    monkeypatch.setattr("decoct.engine.compress.finish_folder", finish_folder)
    monkeypatch.setattr("decoct.engine.disk.free_bytes", lambda _: plan.output_bytes // 2)
    run(base, tmp_path / "out", RTN)


def test_an_impossible_second_stage_is_refused_before_the_first_runs(base: Path, tmp_path: Path) -> None:
    before = untouched(tmp_path)
    with pytest.raises(ValueError, match="svd_llm cannot be applied to a GroupInt weight"):
        run(base, tmp_path / "out", stages=[{"blocks": [RTN]}, {"blocks": [rule(svd_llm={})]}])
    assert untouched(tmp_path) == before


EMBEDDING = {"linear": {"match": "embed", "rtn": {"group_size": 8}}}
LATE = {
    "in a later stage": [{"blocks": [GPTQ]}, {"blocks": [AUTOROUND]}],
    "after more": [{"blocks": [WANDA]}, {"blocks": [GPTQ]}, {"blocks": [EMBEDDING, AUTOROUND]}],
}


@pytest.mark.parametrize("when", LATE)
def test_learning_too_late_is_refused_before_the_first_stage_runs(when: str, base: Path, tmp_path: Path) -> None:
    """Its reference is the model that its own stage began with."""
    before = untouched(tmp_path)
    with pytest.raises(ValueError, match="into the same blocks list as the step that quantizes"):
        run(base, tmp_path / "out", stages=LATE[when])
    assert untouched(tmp_path) == before


def test_learning_on_a_compressed_model_is_refused(base: Path, tmp_path: Path) -> None:
    folder = run(base, tmp_path / "first", RTN).folder
    job = make_job(folder, tmp_path / "out", AUTOROUND, data={"source": str(base.parent / "text.txt")})
    with pytest.raises(ValueError, match="start from the uncompressed model"):
        planned(job)


def test_learning_after_an_earlier_stage_that_pruned(base: Path, tmp_path: Path) -> None:
    stages = [{"blocks": [WANDA]}, {"blocks": [GPTQ, AUTOROUND]}]
    model = open_model(run(base, tmp_path / "out", stages=stages).folder)
    kinds = {node.kind for name in model.described for node in model.weight(name).walk()}
    assert kinds == {"Masked", "GroupInt"}


def test_blocks_that_rules_leave_alone_are_passed_by(base: Path, tmp_path: Path) -> None:
    rules = [{"match": "0.*", "leave": True}, {"match": "mlp.*", "leave": True}, {"gptq": {"group_size": 8}}]
    job = make_job(base, tmp_path / "out", {"linear": rules}, AUTOROUND)
    happens = {group.role: len(group.methods) for group in planned(job).groups}
    assert happens["mlp.up"] == 0
    counts = sorted((g.count, len(g.methods)) for g in planned(job).groups if g.role == "attn.q")
    assert counts == [(1, 0), (2, 2)]
    model = open_model(run(base, tmp_path / "out", {"linear": rules}, AUTOROUND).folder)
    assert {name.split(".")[2] for name in model.described} == {"1", "2"}
    assert all("self_attn" in name for name in model.described)


def test_group_size_counts_only_where_autoround_rounds(base: Path, tmp_path: Path) -> None:
    """What gptq has quantized keeps its groups, whatever autoround would use for the rest."""
    method = {"autoround": {"bits": 4, "group_size": 32, "num_steps": 1}}
    rules = [{"match": "mlp.down", "gptq": {"group_size": 16}}, {"match": "*", "leave": True}]
    plan = planned(make_job(base, tmp_path / "out", {"linear": rules}, method))
    assert plan.output_bytes == pytest.approx(run(base, tmp_path / "out", {"linear": rules}, method).nbytes, rel=0.01)


def test_time_for_learning_is_that_of_each_block(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A method on blocks tells its work from one block's matrices, of which all that depends on widths follows."""
    asked: list[int] = []
    seconds = []
    for work in (0.0, 1e13):
        monkeypatch.setattr(LRQ, "operations", lambda _, entries, *__, work=work: asked.append(entries) or work)
        seconds.append(planned(make_job(base, tmp_path / "out", RTN, {"lrq": {}})).seconds)
    model = open_model(base)
    assert set(asked) == {sum(prod(model.shape(model.prefix(0) + slot.name)) for slot in model.block_slots)}
    assert seconds[1] - seconds[0] == pytest.approx(model.num_blocks * 1e13 / (0.4 * 1e11))


@pytest.mark.parametrize("rank", [None, 1, 8])
def test_a_rank_that_every_matrix_has_is_planned(rank: int | None, base: Path, tmp_path: Path) -> None:
    assert planned(make_job(base, tmp_path / "out", RTN, {"lrq": {"rank": rank, "num_steps": 1}})).output_bytes > 0


def test_memory_for_learning_is_counted_though_the_first_block_is_left(base: Path, tmp_path: Path) -> None:
    quantized = {"linear": [{"match": "0.*", "leave": True}, {"gptq": {"group_size": 8}}]}
    peaks = [
        planned(make_job(base, tmp_path / "out", quantized, {"autoround": {"batch_size": size}})).peak_bytes
        for size in (1, 64)
    ]
    assert peaks[0] < peaks[1]


@pytest.mark.parametrize("name", ["gpt2", "opt", "mixtral"])
def test_sequences_longer_than_the_model_allows(name: str, tmp_path: Path) -> None:
    base = make_base(tmp_path, name)
    with pytest.raises(ValueError, match="sequence_length 65 is more than the model's limit of 64 tokens"):
        run(base, tmp_path / "out", GPTQ, data={"sequence_length": 65})


@pytest.mark.parametrize("data", [{"sequence_length": 65}, {"num_sequences": 100_000}, {"source": "nowhere.txt"}])
def test_unusable_text_is_refused_early(data: Settings, base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"limit of 64 tokens|set data\.num_sequences=\d+|nowhere\.txt does not exist"):
        run(base, tmp_path / "out", GPTQ, data=data)
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GiB", 8 << 30), ("500 MB", 500_000_000), ("1.5kib", 1536), ("42", 42), (42, 42), ("3 TB", 3 * 10**12)],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size
    assert Budget(host=text).host == size  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["", "8 gigs", "GiB", "-1", "1e9"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size; write it as 8GiB"):
        parse_size(text)


def test_sizes_for_people() -> None:
    sizes = {0: "0 B", 1023: "1023 B", 1024: "1.0 KiB", 1.5 * 2**30: "1.5 GiB", 2.0**41: "2.00 TiB"}
    assert [format_size(size) for size in sizes] == list(sizes.values())

"""Stopped anywhere, the same command goes on, and the result has the same bits as one that was never stopped."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from decoct.engine import activations, compress, stream
from decoct.engine.job import Watch
from decoct.engine.journal import Journal, exclusive
from decoct.engine.stages import plan_stages
from decoct.engine.stream import Event
from decoct.engine.summary import read_summary
from decoct.store import RUN_SUMMARY, files, read_json
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
    digests,
    make_base,
    make_job,
    run,
    whole,
)

PARTS = 5


def stop_after(part: int) -> Watch:
    """Crash once this part is reported finished."""

    def event(found: Event) -> None:
        if found.done == part + 1:
            raise Crash

    return Watch(event=event)


def spy(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the shards that are written from now on."""
    written: list[str] = []
    original = stream.write_shard

    def write_shard(path: Path, *arguments: Any) -> int:
        written.append(path.name)
        return original(path, *arguments)

    monkeypatch.setattr(stream, "write_shard", write_shard)
    return written


def on_disk(base: Path, out: Path, *blocks: Settings) -> Settings:
    """A budget that leaves no room for the activations; process sizes must be held constant for it."""
    job = make_job(base, out, *blocks)
    (plan,) = plan_stages(job.model, job.stages, job.data, job.budget, job.out).stages
    assert plan.in_memory
    return {"host": plan.peak_bytes - 1}


@pytest.fixture
def constant_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("decoct.engine.plan.resident_bytes", lambda: 1 << 28)


@pytest.mark.parametrize("part", range(PARTS))
def test_stopped_after_each_part(part: int, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Crash):
        run(base, tmp_path / "out", EVERYTHING, watch=stop_after(part))
    assert not (tmp_path / "out" / "config.json").exists()
    work = spy(monkeypatch)
    result = run(base, tmp_path / "out", EVERYTHING)
    assert len(work) == PARTS - 1 - part, "what was finished is not done again"
    assert digests(result.folder) == whole(base, EVERYTHING)
    assert result.errors.keys() == {"embedding", "block 0", "block 1", "block 2", "lm_head"}
    assert not (tmp_path / "out" / ".run").exists()


POINTS: dict[str, tuple[Any, str, int]] = {
    "before a shard": (stream, "write_shard", 2),
    "before a part is noted": (Journal, "finish", 2),
    "before the journal's line": (Journal, "_append", 3),
    "before the activations are committed": (activations.Activations, "commit", 2),
    "before old activations go": (activations.Activations, "discard", 1),
    "while a block runs": (stream.Runner, "run", 3),
    "before the first file is in place": (files.Path, "replace", 0),
    "while files get in place": (files.Path, "replace", 6),
    "before the folder is finished": (compress, "finish_folder", 0),
    "before the run's folder goes": (compress.shutil, "rmtree", 0),
}


@pytest.mark.parametrize("after", [False, True], ids=["", "just after"])
@pytest.mark.parametrize("point", POINTS)
def test_stopped_in_the_middle(
    point: str, after: bool, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name, call = POINTS[point]
    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, crash_at(call, original, after=after))
    with pytest.raises(Crash):
        run(base, tmp_path / "out", EVERYTHING)
    monkeypatch.setattr(owner, name, original)
    if point == "before the run's folder goes" and after:
        assert digests(tmp_path / "out") == whole(base, EVERYTHING)
        return
    assert digests(run(base, tmp_path / "out", EVERYTHING).folder) == whole(base, EVERYTHING)


PAIRED = (EVERYTHING, AUTOROUND)
"""Two chains of hidden states: of the model as it becomes and as it was."""

PAIRED_POINTS: dict[str, tuple[Any, str, int]] = {
    "before the second chain begins": (activations.Activations, "commit", 1),
    "between the two chains' outputs": (activations.Activations, "commit", 3),
    "between removing the two chains' inputs": (activations.Activations, "discard", 1),
    "while it learns": (stream.Runner, "lay_out_matrices", 20),
    "before a part is noted": (Journal, "finish", 2),
}


@pytest.mark.parametrize("part", range(PARTS))
def test_two_chains_stopped_after_each_part(part: int, base: Path, tmp_path: Path) -> None:
    with pytest.raises(Crash):
        run(base, tmp_path / "out", *PAIRED, watch=stop_after(part))
    assert digests(run(base, tmp_path / "out", *PAIRED).folder) == whole(base, *PAIRED)
    assert not (tmp_path / "out" / ".run").exists()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # files that the crash left open
@pytest.mark.usefixtures("constant_memory")
@pytest.mark.parametrize("in_memory", [True, False], ids=["in memory", "on disk"])
@pytest.mark.parametrize("after", [False, True], ids=["", "just after"])
@pytest.mark.parametrize("point", PAIRED_POINTS)
def test_two_chains_stopped_in_the_middle(
    point: str, after: bool, in_memory: bool, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name, call = PAIRED_POINTS[point]
    budget = {} if in_memory else on_disk(base, tmp_path / "out", *PAIRED)
    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, crash_at(call, original, after=after))
    with pytest.raises(Crash):
        run(base, tmp_path / "out", *PAIRED, budget=budget)
    monkeypatch.setattr(owner, name, original)
    assert digests(run(base, tmp_path / "out", *PAIRED, budget=budget).folder) == whole(base, *PAIRED)


@pytest.mark.usefixtures("constant_memory")
def test_two_chains_on_disk_give_the_same_bits(base: Path, tmp_path: Path) -> None:
    plans = []
    budget = on_disk(base, tmp_path / "out", *PAIRED)
    watch = Watch(planned=lambda plan, *_: plans.append(plan))
    folder = run(base, tmp_path / "out", *PAIRED, budget=budget, watch=watch).folder
    assert not plans[0].in_memory
    assert digests(folder) == whole(base, *PAIRED)
    assert digests(folder) != whole(base, EVERYTHING), "learning changed something"


def test_a_lost_second_chain_says_so(base: Path, tmp_path: Path) -> None:
    with pytest.raises(Crash):
        run(base, tmp_path / "out", *PAIRED, watch=stop_after(2))
    for path in (tmp_path / "out").rglob("reference-*.bin"):
        path.unlink()
    with pytest.raises(ValueError, match=r"reference-00002\.bin is missing or damaged.*--fresh"):
        run(base, tmp_path / "out", *PAIRED)


@pytest.mark.usefixtures("constant_memory")
def test_activations_on_disk_give_the_same_bits(base: Path, tmp_path: Path) -> None:
    budget = on_disk(base, tmp_path / "out", EVERYTHING)
    plans = []
    watch = Watch(planned=lambda plan, *_: plans.append(plan))
    result = run(base, tmp_path / "out", EVERYTHING, budget=budget, watch=watch)
    assert digests(result.folder) == whole(base, EVERYTHING)
    assert not plans[0].in_memory


@pytest.mark.usefixtures("constant_memory")
@pytest.mark.parametrize("part", [0, 2])
def test_memory_may_change_between_start_and_resumption(part: int, base: Path, tmp_path: Path) -> None:
    budgets: list[Settings] = [on_disk(base, tmp_path / "out", EVERYTHING), {}]
    for out, (first, second) in (("a", budgets), ("b", budgets[::-1])):
        with pytest.raises(Crash):
            run(base, tmp_path / out, EVERYTHING, budget=first, watch=stop_after(part))
        assert digests(run(base, tmp_path / out, EVERYTHING, budget=second).folder) == whole(base, EVERYTHING)


@pytest.mark.usefixtures("constant_memory")
def test_scratch_elsewhere(base: Path, tmp_path: Path) -> None:
    budget = {**on_disk(base, tmp_path / "out", EVERYTHING), "scratch": str(tmp_path / "scratch")}
    with pytest.raises(Crash):
        run(base, tmp_path / "out", EVERYTHING, budget=budget, watch=stop_after(2))
    assert [path.name for path in (tmp_path / "scratch").rglob("*.bin")] == ["activations-00002.bin"]
    assert not list((tmp_path / "out").rglob("*.bin"))
    assert digests(run(base, tmp_path / "out", EVERYTHING, budget=budget).folder) == whole(base, EVERYTHING)
    assert not list((tmp_path / "scratch").iterdir())


def test_lost_activations_say_so(base: Path, tmp_path: Path) -> None:
    with pytest.raises(Crash):
        run(base, tmp_path / "out", EVERYTHING, watch=stop_after(2))
    for path in (tmp_path / "out").rglob("activations-*.bin"):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"activations-00002\.bin is missing or damaged.*--fresh"):
        run(base, tmp_path / "out", EVERYTHING)
    assert digests(run(base, tmp_path / "out", EVERYTHING, fresh=True).folder) == whole(base, EVERYTHING)


def test_a_damaged_shard_of_an_unfinished_run_is_made_again(base: Path, tmp_path: Path) -> None:
    with pytest.raises(Crash):
        run(base, tmp_path / "out", RTN, watch=stop_after(2))
    shard = min((tmp_path / "out").rglob("model-00002-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x55")
    assert digests(run(base, tmp_path / "out", RTN).folder) == whole(base, RTN)


@pytest.mark.parametrize("kept", [1, 40, -1], ids=["a character", "a piece", "all but the line's end"])
@pytest.mark.parametrize("line", range(4))
def test_a_torn_last_line(line: int, kept: int, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Line 0 says which run it is; a line is on disk before what it makes superfluous goes."""
    original = Journal._append
    calls = iter(range(100))

    def tear(journal: Journal, entry: dict[str, Any]) -> None:
        number = next(calls)
        original(journal, entry)
        if number == line:
            lines = journal._path.read_bytes().splitlines(keepends=True)
            journal._path.write_bytes(b"".join(lines[:-1]) + lines[-1][:kept])
            raise Crash

    monkeypatch.setattr(Journal, "_append", tear)
    with pytest.raises(Crash):
        run(base, tmp_path / "out", EVERYTHING)
    monkeypatch.setattr(Journal, "_append", original)
    assert digests(run(base, tmp_path / "out", EVERYTHING).folder) == whole(base, EVERYTHING)


def test_journal(tmp_path: Path) -> None:
    journal = Journal(tmp_path, {"recipe": 1}, tmp_path)
    (tmp_path / "a.bin").write_bytes(b"abc")
    (tmp_path / "b.bin").write_bytes(b"abc")
    journal.finish("first", tmp_path / "a.bin", error=0.5)
    journal.finish("second", tmp_path / "b.bin", error=None)
    path = tmp_path / "journal.jsonl"
    path.write_text(path.read_text(encoding="utf-8")[:-7], encoding="utf-8")
    again = Journal(tmp_path, {"recipe": 1}, tmp_path)
    assert again.finished("second") is None
    line = again.finished("first")
    assert line is not None
    assert line["error"] == 0.5
    again.finish("second", tmp_path / "b.bin", error=1.0)
    third = Journal(tmp_path, {"recipe": 1}, tmp_path)
    assert third.finished("second") is not None
    (tmp_path / "a.bin").write_bytes(b"abd")
    assert third.finished("first") is None
    with pytest.raises(ValueError, match="unfinished run with another recipe"):
        Journal(tmp_path, {"recipe": 2}, tmp_path)


CHANGED: dict[str, Callable[[Path], dict[str, Any]]] = {
    "stage": lambda _: {"blocks": ({"linear": {"gptq": {"bits": 3, "group_size": 8}}},)},
    "data": lambda _: {"data": {"num_sequences": 3}},
    "source": lambda tmp: {"base": make_base(tmp / "other", hidden_size=64)},
}


@pytest.mark.parametrize("what", CHANGED)
def test_another_recipe_on_an_unfinished_folder(what: str, base: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with pytest.raises(Crash):
        run(base, tmp_path / "out", GPTQ, watch=stop_after(1))
    before = digests(tmp_path / "out")
    changes = CHANGED[what](tmp_path)
    blocks = changes.pop("blocks", (GPTQ,))
    source = changes.pop("base", base)
    with pytest.raises(ValueError, match=rf"out.* holds an unfinished run with another .*{what}.*--fresh to discard"):
        run(source, tmp_path / "out", *blocks, **changes)
    assert {name: digests(tmp_path / "out")[name] for name in before if "tokens" not in name}.items() <= before.items()
    result = run(source, tmp_path / "out", *blocks, fresh=True, **changes)
    assert digests(result.folder) == digests(run(source, tmp_path / "whole", *blocks, **changes).folder)


def test_a_noisy_machine_does_not_change_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What blocks run in is measured with a stop-watch; a resumed run must keep what it started with."""
    base = make_base(tmp_path, dtype=torch.bfloat16)
    monkeypatch.setattr("decoct.engine.plan.compute_dtype", lambda _: torch.float32)
    expected = digests(run(base, tmp_path / "whole", GPTQ).folder)
    with pytest.raises(Crash):
        run(base, tmp_path / "out", GPTQ, watch=stop_after(1))
    monkeypatch.setattr("decoct.engine.plan.compute_dtype", lambda _: torch.bfloat16)
    assert digests(run(base, tmp_path / "out", GPTQ).folder) == expected


TWO_STAGES = [{"blocks": [WANDA]}, {"blocks": [GPTQ, EORA]}]


def test_two_stages_do_what_two_runs_do(base: Path, tmp_path: Path) -> None:
    first = run(base, tmp_path / "first", WANDA).folder
    second = run(first, tmp_path / "second", GPTQ, EORA, data={"source": str(base.parent / "text.txt")}).folder
    both = run(base, tmp_path / "both", stages=TWO_STAGES).folder
    shards = {name: digest for name, digest in digests(both).items() if name.endswith(".safetensors")}
    assert shards.items() <= digests(second).items()
    lineage = read_json(both / "decoct.json")["lineage"]
    assert [entry["stage"]["blocks"][0]["linear"][0].keys() - {"match"} for entry in lineage] == [{"wanda"}, {"gptq"}]
    assert not (both / ".run").exists()


def test_two_stages_give_the_same_bits_every_time(base: Path, tmp_path: Path) -> None:
    assert digests(run(base, tmp_path / "out", stages=TWO_STAGES).folder) == whole(base, stages=TWO_STAGES)


@pytest.mark.parametrize("stopped", [(0, 2), (0, 4), (1, 0), (1, 2), (1, 4)])
def test_two_stages_resume(
    stopped: tuple[int, int], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finished stage is not done again, and what the second one did counts."""
    seen: list[Event] = []

    def event(found: Event) -> None:
        seen.append(found)
        if len(seen) == stopped[0] * PARTS + stopped[1] + 1:
            raise Crash

    with pytest.raises(Crash):
        run(base, tmp_path / "out", stages=TWO_STAGES, watch=Watch(event=event))
    work = spy(monkeypatch)
    result = run(base, tmp_path / "out", stages=TWO_STAGES)
    assert len(work) == 2 * PARTS - len(seen), "finished parts are restored, not done again"
    assert digests(result.folder) == whole(base, stages=TWO_STAGES)


def test_the_summary_stands_apart(base: Path, tmp_path: Path) -> None:
    result = run(base, tmp_path / "out", EVERYTHING)
    summary = read_summary(result.folder)
    assert summary == json.loads((result.folder / RUN_SUMMARY).read_text())
    (stage,) = summary["stages"]
    assert (stage["stage"], stage["steps"]) == ("blocks", [])
    assert [part["part"] for part in stage["parts"]] == ["embedding", "block 0", "block 1", "block 2", "lm_head"]
    assert sum(part["nbytes"] for part in stage["parts"]) == result.nbytes
    assert summary["peak_bytes"] > 0


def test_only_one_process_at_a_time(base: Path, tmp_path: Path) -> None:
    with exclusive(tmp_path / "out" / ".run"):
        for fresh in (False, True):
            with pytest.raises(ValueError, match=r"another decoct process is writing to .*out; wait for it or stop it"):
                run(base, tmp_path / "out", RTN, fresh=fresh)
            assert (tmp_path / "out" / ".run" / "lock").exists(), "the other process still works there"
    assert not (tmp_path / "out").exists()  # nothing was done there
    run(base, tmp_path / "out", RTN)

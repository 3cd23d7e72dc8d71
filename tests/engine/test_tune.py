"""End-to-end tuning: gradients of every stored number, what changes and what does not, stopping and going on."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

import decoct
from decoct.engine import compress, tune
from decoct.engine.data import load_tokens
from decoct.engine.job import Watch
from decoct.engine.journal import Journal
from decoct.engine.stream import Event
from decoct.engine.summary import Result, read_result, read_summary
from decoct.engine.tune import Tuner, Tuning
from decoct.methods.quantize.e2e_qp import E2EQP, RelativeAdam
from decoct.model import Model, open_model
from decoct.weights import trainable
from tests.engine.running import (
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
from tests.engine.test_resume import spy

STEPS, PARTS = 4, 5


def stages(*blocks: Settings, **settings: Any) -> dict[str, Any]:
    """A streamed pass with these steps, then tuning."""
    return {"stages": [{"blocks": list(blocks)}, {"e2e_qp": {"num_steps": STEPS, **settings}}]}


TUNED = stages(EVERYTHING)


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint after every step."""
    monkeypatch.setattr(tune, "_SAVE_SECONDS", 0.0)


def tuner(base: Path, tmp_path: Path, *blocks: Settings, dtype: torch.dtype = torch.float64) -> tuple[Tuner, Tuning]:
    job = make_job(base, tmp_path / "out", *blocks)
    model = open_model(run(base, tmp_path / "out", *blocks).folder)
    tokens = load_tokens(job.data, job.model, print)
    journal = Journal(tmp_path / "tuning", {}, tmp_path)
    todo = Tuning(E2EQP(), model, job.model, tokens, dtype, tmp_path / "tuning", journal, lambda _: None)
    return Tuner(todo), todo


def exact_divergence(logits: torch.Tensor, teacher: torch.Tensor) -> tuple[float, torch.Tensor]:
    """As the method's own, in float64."""
    own, wanted = torch.log_softmax(logits.double(), -1), torch.log_softmax(teacher.double(), -1)
    return float((wanted.exp() * (wanted - own)).sum()), own.exp() - wanted.exp()


def group(model: Model, name: str) -> str:
    if name.startswith(model.family.blocks):
        return "matrices" if "/" in name else "vectors"
    return name


QUANTIZED = [
    {"match": ["embed", "lm_head"], "rtn": {"bits": 8, "group_size": 8}},
    {"match": "*", "rtn": {"bits": 4, "group_size": 8}},
]
STEPS_OF: dict[str, tuple[Settings, ...]] = {
    "quantized": ({"linear": QUANTIZED},),
    "sparse": (WANDA,),
    "factors and a correction": (
        {
            "linear": [
                {"match": "mlp.*", "svd_llm": {"keep": 0.7}},
                {"match": "attn.*", "rtn": {"bits": 3, "group_size": 8}},
            ]
        },
        {"linear": {"match": "attn.*", "eora": {"rank": 2}}},
    ),
    "trellis": ({"linear": {"match": "*", "qtip": {"bits": 2, "state_bits": 6}}},),
    "codebooks": ({"linear": {"match": "*", "aqlm": {"code_bits": 3, "vector": 4}}},),
}
CASES = [
    *((name, "quantized") for name in ("llama", "llama-tied", "gpt2", "gemma2", "opt", "mixtral", "qwen3_moe")),
    *(("llama", steps) for steps in ("sparse", "factors and a correction", "trellis", "codebooks")),
]


@pytest.mark.parametrize(("name", "steps"), CASES)
def test_gradients_are_those_of_finite_differences(
    name: str, steps: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Along a random direction in each group of stored numbers, and those groups are all there are."""
    base = make_base(tmp_path, name)
    tuned, todo = tuner(base, tmp_path, *STEPS_OF[steps])
    # Rounding to what is stored would hide small changes.
    adam = tuned.adam
    monkeypatch.setattr(
        adam, "value", lambda key: adam._first[key].double() + adam.state["moved"][key] * adam._units[key]
    )
    monkeypatch.setattr(tune, "kl_and_slope", exact_divergence)  # nor are float32's seven digits enough
    monkeypatch.setattr(tune, "LOGITS_AT_ONCE", 96 * 5)  # several pieces a sequence, the last one short
    tokens = todo.tokens[:2]
    loss, found = tuned.gradients(tokens)
    gradients = {key: gradient.clone() for key, gradient in found.items()}
    assert loss > 1e-3
    assert gradients.keys() == adam._first.keys()
    groups: dict[str, list[str]] = {}
    for key in gradients:
        groups.setdefault(group(todo.model, key), []).append(key)
    ends = {slot.name for slot in todo.model.end_slots} if steps == "quantized" else set()
    assert {key.split("/")[0] for key in groups} > {"matrices", "vectors", *ends}
    assert any("norm" in key or "ln_f" in key for key in groups), "the final norm"
    for number, keys in enumerate(groups.values()):
        generator = torch.Generator().manual_seed(number)
        directions = {key: torch.randn(gradients[key].shape, generator=generator) for key in keys}
        expected = sum(float((gradients[key] * directions[key] * adam._units[key]).sum()) for key in keys)
        size = sum(float((gradients[key] * adam._units[key]).square().sum()) for key in keys) ** 0.5
        losses = []
        for sign in (-1, 1):
            for key in keys:
                adam.state["moved"][key] = sign * 1e-4 * directions[key]
            losses.append(tuned.gradients(tokens)[0])
            for key in keys:
                adam.state["moved"][key] = torch.zeros_like(directions[key])
        actual = (losses[1] - losses[0]) / 2e-4
        assert actual == pytest.approx(expected, abs=0.01 * size), keys[0]
        assert size > 0


def test_norms_may_be_left_alone(base: Path, tmp_path: Path) -> None:
    out = run(base, tmp_path / "out", **stages(RTN, norms=False)).folder
    ours, theirs = open_model(out), open_model(base)
    for block in (None, 0, 1, 2):
        for name in theirs.others(block):
            assert torch.equal(ours.tensor(name), theirs.tensor(name))
    assert not torch.equal(*(m.weight("model.layers.0.mlp.up_proj.weight").unpack() for m in (ours, theirs)))


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "mixtral"])
def test_only_real_numbers_change(name: str, tmp_path: Path) -> None:
    """Codes, masks, what was left uncompressed, kinds and sizes stay."""
    base = make_base(tmp_path, name)
    rules = [{"match": ["embed", "lm_head"], "rtn": {"bits": 8, "group_size": 8}}, {"match": "0.*", "leave": True}]
    steps: Settings = {"linear": [*rules, {"rtn": {"bits": 4, "group_size": 8, "symmetric": False}}]}
    before = open_model(run(base, tmp_path / "before", steps).folder)
    result = run(base, tmp_path / "after", **stages(steps))
    after = open_model(result.folder)
    assert after.described == before.described
    assert result.nbytes == before.nbytes == sum(open_size(path) for path in result.folder.glob("model-*"))
    changed = set()
    for slot in before.slots():
        old, new = before.weight(slot).tensors(), after.weight(slot).tensors()
        real = trainable(before.weight(slot)) if slot in before.described else {}
        assert all(torch.equal(old[part], new[part]) for part in old if part not in real)
        changed.update(slot for part in real if not torch.equal(old[part], new[part]))
        assert all(new[part].dtype == old[part].dtype for part in old)
    assert changed >= {slot for slot in before.described if ".experts." not in slot}
    vectors = tune.vectors(before)
    moved = [n for n in vectors if not torch.equal(before.tensor(n), after.tensor(n))]
    assert len(moved) > 0.8 * len(vectors)
    assert [entry["stage"].keys() for entry in after.lineage] == [{"blocks"}, {"e2e_qp"}]


def open_size(shard: Path) -> int:
    return shard.stat().st_size - 8 - int.from_bytes(shard.read_bytes()[:8], "little")


def test_a_real_model_gets_nearer_to_what_it_was(stories: Path, story_text: Path, tmp_path: Path) -> None:
    """On text that it was not tuned on."""
    text = story_text.read_text(encoding="utf-8")
    (tmp_path / "train.txt").write_text(text[:100_000], encoding="utf-8")
    (tmp_path / "test.txt").write_text(text[-30_000:], encoding="utf-8")
    rules = [
        {"match": "embed", "rtn": {"bits": 8, "group_size": 8}},
        {"match": "*", "gptq": {"bits": 3, "group_size": 4}},
    ]
    data = {"source": str(tmp_path / "train.txt"), "num_sequences": 16, "sequence_length": 128}
    streamed = {"blocks": [{"linear": rules}]}
    results = {}
    for name, more in (("gptq", []), ("tuned", [{"e2e_qp": {"num_steps": 24, "learning_rate": 4e-3}}])):
        recipe = {"data": data, "stages": [streamed, *more]}
        results[name] = decoct.compress(stories, recipe, tmp_path / name)
    losses = results["tuned"].losses
    assert len(losses) == 24
    assert sum(losses[-6:]) < 0.85 * sum(losses[:6])
    assert results["tuned"].nbytes == results["gptq"].nbytes
    measure = {"text": tmp_path / "test.txt", "against": stories, "windows": 12, "length": 256}
    kl = {name: decoct.evaluate(result.folder, **measure).kl_mean for name, result in results.items()}
    assert kl["tuned"] < 0.95 * kl["gptq"], kl


# Stopping and going on


_results: dict[Path, Result] = {}


def whole_result(base: Path) -> Result:
    """Of a run that nothing stops."""
    if base not in _results:
        _results[base] = run(base, base.parent / "tuned", **TUNED)
    return _results[base]


def told(result: Result) -> dict[str, Any]:
    """What does not depend on the process."""
    return {**asdict(result), "folder": None, "seconds": None, "peak_bytes": None}


def stop_after(done: int) -> Watch:
    """Crash at this event of the tuning stage."""

    def event(found: Event) -> None:
        nonlocal done
        done -= 1
        if done < 0:
            raise Crash

    return Watch(event=event)


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize(
    "done", [PARTS, PARTS + 2, PARTS + STEPS - 1, PARTS + STEPS, PARTS + STEPS + 3, 2 * PARTS + STEPS - 1]
)
def test_stopped_after_a_step_or_a_part(done: int, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done is not done again, and nothing of it is missing from the summary."""
    with pytest.raises(Crash):
        run(base, tmp_path / "out", watch=stop_after(done), **TUNED)
    written, steps = spy(monkeypatch), []
    original = RelativeAdam.step
    monkeypatch.setattr(RelativeAdam, "step", lambda adam, g, n, rate: (steps.append(n), original(adam, g, n, rate)))
    result = run(base, tmp_path / "out", **TUNED)
    assert not written, "the first stage is over"
    assert steps == list(range(min(STEPS, done + 1 - PARTS), STEPS))
    assert digests(result.folder) == whole(base, **TUNED)
    assert told(result) == told(whole_result(base))
    stages = read_summary(result.folder)["stages"]
    assert [len(stage[kind]) for stage in stages for kind in ("steps", "parts")] == [0, PARTS, STEPS, PARTS]


POINTS: dict[str, tuple[Any, str, int]] = {
    "before the first step": (RelativeAdam, "step", 0),
    "before a checkpoint": (tune, "save_safetensors", 1),
    "before the last checkpoint": (tune, "save_safetensors", STEPS - 1),
    "before a shard": (tune, "write_shard", 2),
    "before a part is noted": (Journal, "finish", PARTS + 2),
    "before the last part is noted": (Journal, "finish", 2 * PARTS - 1),
    "before the journal's first line": (Journal, "_append", PARTS + 1),
    "before the folder is finished": (compress, "finish_folder", 1),
    "before the first stage's folder is finished": (compress, "finish_folder", 0),
}


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("after", [False, True], ids=["", "just after"])
@pytest.mark.parametrize("point", POINTS)
def test_stopped_in_the_middle(
    point: str, after: bool, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name, call = POINTS[point]
    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, crash_at(call, original, after=after))
    with pytest.raises(Crash):
        run(base, tmp_path / "out", **TUNED)
    monkeypatch.setattr(owner, name, original)
    result = run(base, tmp_path / "out", **TUNED)
    assert digests(result.folder) == whole(base, **TUNED)
    assert len(result.losses) == STEPS


def test_without_a_checkpoint_it_begins_again(base: Path, tmp_path: Path) -> None:
    with pytest.raises(Crash):
        run(base, tmp_path / "out", watch=stop_after(PARTS + 2), **TUNED)
    assert not list((tmp_path / "out").rglob("tuning.safetensors"))
    assert digests(run(base, tmp_path / "out", **TUNED).folder) == whole(base, **TUNED)


# Other settings


SLOWER = stages(EVERYTHING, learning_rate=1e-4)


@pytest.mark.usefixtures("often")
def test_settings_may_change_until_a_part_is_finished(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The remedy for a tune that diverges must not cost the stages before it."""
    with pytest.raises(Crash):
        run(base, tmp_path / "out", watch=stop_after(PARTS + 2), **TUNED)
    written, messages = spy(monkeypatch), []
    result = run(base, tmp_path / "out", watch=Watch(message=messages.append), **SLOWER)
    assert not written
    assert messages == ["e2e_qp starts again with the new settings; the stages before it are kept"]
    assert digests(result.folder) == whole(base, **SLOWER) != whole(base, **TUNED)


def test_the_remedy_for_a_loss_that_is_not_finite_works(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = tune.kl_and_slope
    monkeypatch.setattr(tune, "kl_and_slope", lambda *logits: (float("nan"), original(*logits)[1]))
    with pytest.raises(ValueError, match=r"loss is not finite; lower e2e_qp\.learning_rate"):
        run(base, tmp_path / "out", **TUNED)
    monkeypatch.setattr(tune, "kl_and_slope", original)
    assert digests(run(base, tmp_path / "out", **SLOWER).folder) == whole(base, **SLOWER)


@pytest.mark.usefixtures("often")
def test_stopped_while_the_old_settings_steps_are_discarded(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of other settings are never taken for this run's."""
    with pytest.raises(Crash):
        run(base, tmp_path / "out", watch=stop_after(PARTS + 2), **TUNED)
    original = shutil.rmtree

    def journal_first(folder: Path) -> None:
        (folder / "journal.jsonl").unlink()
        raise Crash

    monkeypatch.setattr(compress.shutil, "rmtree", journal_first)
    with pytest.raises(Crash):
        run(base, tmp_path / "out", **SLOWER)
    monkeypatch.setattr(compress.shutil, "rmtree", original)
    assert digests(run(base, tmp_path / "out", **SLOWER).folder) == whole(base, **SLOWER)


def test_what_has_finished_a_part_keeps_its_settings(base: Path, tmp_path: Path) -> None:
    with pytest.raises(Crash):
        run(base, tmp_path / "out", watch=stop_after(PARTS + STEPS + 1), **TUNED)
    with pytest.raises(ValueError, match="holds an unfinished run with another stage; repeat the first command"):
        run(base, tmp_path / "out", **SLOWER)
    assert digests(run(base, tmp_path / "out", **TUNED).folder) == whole(base, **TUNED)


@pytest.mark.usefixtures("often")
def test_another_number_of_threads_discards_nothing(base: Path, tmp_path: Path) -> None:
    """That is no wish for other settings: steps may have taken hours."""
    with pytest.raises(Crash):
        run(base, tmp_path / "out", watch=stop_after(PARTS + 2), stages=[{"blocks": [RTN]}, *TUNED["stages"][1:]])
    journal = tmp_path / "out" / ".run" / "stage-1" / "journal.jsonl"
    entry = json.loads(journal.read_text())
    entry["identity"]["threads"] = 7
    journal.write_text(json.dumps(entry) + "\n")
    with pytest.raises(ValueError, match="holds an unfinished run with another threads"):
        run(base, tmp_path / "out", stages=[{"blocks": [RTN]}, *TUNED["stages"][1:]])
    assert (journal.parent / "tuning.safetensors").exists()


# What is told


def test_the_summary_tells_parts_and_steps_of_every_stage(base: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    result = run(base, tmp_path / "out", watch=Watch(event=events.append), **TUNED)
    assert [(event.done, event.total) for event in events] == [
        *((n + 1, total) for total in (PARTS, STEPS, PARTS) for n in range(total))
    ]
    streamed, tuned = read_summary(result.folder)["stages"]
    assert (streamed["stage"], tuned["stage"]) == ("blocks", "e2e_qp")
    names = ["embedding", "block 0", "block 1", "block 2", "lm_head"]
    assert [part["part"] for part in streamed["parts"]] == [part["part"] for part in tuned["parts"]] == names
    assert [step["step"] for step in tuned["steps"]] == [1, 2, 3, 4]
    assert result.losses == tuple(step["loss"] for step in tuned["steps"]) == tuple(e.loss for e in events if e.loss)
    assert sum(part["nbytes"] for part in tuned["parts"]) == result.nbytes
    assert all(part["error"] is None for part in tuned["parts"])
    assert result.errors == {part["part"]: part["error"] for part in streamed["parts"]}
    assert result.errors.keys() == set(names)
    assert result == read_result(result.folder)


@pytest.mark.parametrize(
    "second", [{"e2e_qp": {"num_steps": 1}}, {"blocks": [{"linear": {"match": "attn.q", "leave": True}}]}]
)
def test_starved_experts_of_every_stage_are_told(second: Settings, tmp_path: Path) -> None:
    base = make_base(tmp_path, "mixtral")
    data = {"num_sequences": 1, "sequence_length": 2}
    alone = run(base, tmp_path / "alone", GPTQ, data=data)
    both = run(base, tmp_path / "both", data=data, stages=[{"blocks": [GPTQ]}, second])
    assert both.starved == alone.starved != ()


def test_the_same_twice(base: Path, tmp_path: Path) -> None:
    assert digests(run(base, tmp_path / "out", **TUNED).folder) == whole(base, **TUNED)

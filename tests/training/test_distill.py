"""Distillation as a stage: it heals, keeps every form, goes on where it was stopped, and stands among other stages."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import decoct
from decoct.engine.job import Watch
from decoct.engine.stream import Event
from decoct.methods.heal.distill import Distill
from decoct.model import Model, open_model
from decoct.recipe import RecipeError, build_method
from decoct.training import loop
from decoct.weights import Weight, trainable
from tests.engine.running import GPTQ, RTN, WANDA, Crash, Settings, digests, make_base, run, whole

STEPS, PARTS = 4, 5
DISTILL: Settings = {"distill": {"num_steps": STEPS, "batch_size": 2, "sequence_length": 16}}


def stages(*blocks: Settings, **settings: Any) -> dict[str, Any]:
    """A streamed pass with these steps, then training."""
    return {"stages": [{"blocks": list(blocks)}, {"distill": {**DISTILL["distill"], **settings}}]}


def real(weight: Weight) -> set[str]:
    return set(trainable(weight))


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint after every step."""
    monkeypatch.setattr(loop, "_SAVE_SECONDS", 0.0)
    monkeypatch.setattr(loop, "_SAVE_SHARE", 0.0)


FORMS: dict[str, tuple[Settings, ...]] = {
    "quantized": (GPTQ,),
    "sparse": (WANDA,),
    "sparse and quantized": (WANDA, GPTQ),
    "factors": ({"linear": {"svd_llm": {"keep": 0.7}}}, {"linear": {"rtn": {"bits": 4, "group_size": "channel"}}}),
    "a correction": (RTN, {"linear": {"eora": {"rank": 2}}}),
    "a trellis": ({"linear": {"match": "*", "qtip": {"bits": 2, "state_bits": 6}}},),
    "codebooks": ({"linear": {"match": "*", "squeezellm": {"bits": 3}}},),
    "trits": ({"linear": {"match": "*", "ternary": {"group_size": 8}}},),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_kept(form: str, base: Path, tmp_path: Path) -> None:
    """Codes, masks and positions are the same bits; numbers change; so does no size."""
    before = open_model(run(base, tmp_path / "before", *FORMS[form]).folder)
    result = run(base, tmp_path / "after", **stages(*FORMS[form], learning_rate=0.02))
    after = open_model(result.folder)
    assert after.described == before.described
    assert result.nbytes == before.nbytes
    changed = 0
    for name in before.slots():
        old, new = before.weight(name).tensors(), after.weight(name).tensors()
        numbers = real(before.weight(name))
        assert all(torch.equal(old[part], new[part]) for part in old if part not in numbers)
        changed += any(not torch.equal(old[part], new[part]) for part in numbers)
        if form.startswith("sparse"):
            zeros = before.weight(name).unpack() == 0
            assert form != "sparse" or torch.equal(after.weight(name).unpack() == 0, zeros)
    assert changed >= 0.9 * len(before.block_slots) * before.num_blocks
    norms = [name for block in (0, 1, 2, None) for name in before.others(block)]
    assert sum(not torch.equal(before.tensor(name), after.tensor(name)) for name in norms) > 0.8 * len(norms)
    assert [list(entry["stage"]) for entry in after.lineage] == [["blocks"], ["distill"]]
    assert after.lineage[-1]["training"]["steps"] == STEPS


def test_a_real_model_heals(stories: Path, story_text: Path, tmp_path: Path) -> None:
    """On text that it was not trained on; told apart from what compressed it by a folder of its own."""
    text = story_text.read_text(encoding="utf-8")
    (tmp_path / "train.txt").write_text(text[:-40_000], encoding="utf-8")
    (tmp_path / "test.txt").write_text(text[-30_000:], encoding="utf-8")
    data = {"source": str(tmp_path / "train.txt"), "num_sequences": 16, "sequence_length": 64}
    sparse = {"data": data, "stages": [{"blocks": [WANDA]}]}
    decoct.compress(stories, sparse, tmp_path / "sparse")
    settings = [
        f"teacher={stories}", "distill.num_steps=30", "distill.learning_rate=0.004", "distill.evaluate_every=10",
        *(f"data.{key}={value}" for key, value in data.items()),
    ]  # fmt: skip
    result = decoct.compress(tmp_path / "sparse", "heal", tmp_path / "healed", settings=settings)
    assert len(result.losses) == 30
    assert sum(result.losses[-6:]) < 0.8 * sum(result.losses[:6])
    measure = {"text": tmp_path / "test.txt", "against": stories, "windows": 8, "length": 128}
    kl = {name: decoct.evaluate(tmp_path / name, **measure).kl_mean for name in ("sparse", "healed")}
    assert kl["healed"] < 0.8 * kl["sparse"], kl
    looks = open_model(tmp_path / "healed").lineage[-1]["training"]["held_out"]
    assert [step for step, _ in looks] == [10, 20, 30]


# Among other stages


def test_between_pruning_and_quantizing(base: Path, tmp_path: Path) -> None:
    """The mask is made, healed, and kept by what quantizes afterwards."""
    recipe = {"stages": [{"blocks": [WANDA]}, DISTILL, {"blocks": [GPTQ]}]}
    made = open_model(run(base, tmp_path / "out", **recipe).folder)
    name = "model.layers.1.mlp.up_proj.weight"
    assert made.described[name]["kind"] == "Masked"
    assert made.described[name]["inner"]["kind"] == "GroupInt"
    healed = open_model(run(base, tmp_path / "healed", stages=recipe["stages"][:2]).folder)
    zeros = healed.weight(name).unpack() == 0
    assert bool((made.weight(name).unpack()[zeros] == 0).all())


def test_after_blocks_were_taken_out(tmp_path: Path) -> None:
    base = make_base(tmp_path, num_hidden_layers=5)
    recipe = {"stages": [{"sleb": {"num_dropped": 2}}, DISTILL]}
    made = open_model(run(base, tmp_path / "out", **recipe).folder)
    assert made.num_blocks == 3
    assert not made.described


@pytest.mark.parametrize("train", [["norms"], ["ends"], ["matrices", "ends", "norms"]])
def test_what_is_trained(train: list[str], base: Path, tmp_path: Path) -> None:
    settings = {**DISTILL["distill"], "train": train, "loss": "cross_entropy"}
    made = open_model(run(base, tmp_path / "out", stages=[{"distill": settings}]).folder)
    was = open_model(base)
    block = "model.layers.0.mlp.up_proj.weight"
    changed = {
        "matrices": not torch.equal(made.weight(block).unpack(), was.weight(block).unpack()),
        "norms": not torch.equal(made.tensor("model.norm.weight"), was.tensor("model.norm.weight")),
        "ends": not torch.equal(made.weight(made.family.embed).unpack(), was.weight(was.family.embed).unpack()),
    }
    assert {name for name, each in changed.items() if each} == set(train)


def test_accumulated_batches_are_one_step(base: Path, tmp_path: Path) -> None:
    """Two batches of one sequence weigh what one batch of two does."""
    found = []
    for size, times in ((2, 1), (1, 2)):
        result = run(base, tmp_path / f"{size}", **stages(RTN, batch_size=size, accumulate=times))
        found.append(result.losses)
    assert found[0] == pytest.approx(found[1], rel=1e-4)


# Stopping and going on


SEEN = stages(GPTQ, evaluate_every=2, held_out=2)


def stop_after(done: int) -> Watch:
    """Crash at this event."""

    def event(found: Event) -> None:
        nonlocal done
        done -= 1
        if done < 0:
            raise Crash

    return Watch(event=event)


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("done", [PARTS, PARTS + 2, PARTS + STEPS - 1, PARTS + STEPS + 2])
def test_stopped_after_a_step_or_a_part(done: int, base: Path, tmp_path: Path) -> None:
    """The result has the same bits as that of a run that nothing stops."""
    with pytest.raises(Crash):
        run(base, tmp_path / "out", watch=stop_after(done), **SEEN)
    result = run(base, tmp_path / "out", **SEEN)
    assert digests(result.folder) == whole(base, **SEEN)
    assert len(result.losses) == STEPS


def test_settings_may_change_before_it_is_finished(base: Path, tmp_path: Path) -> None:
    with pytest.raises(Crash):
        run(base, tmp_path / "out", watch=stop_after(PARTS + 1), **stages(RTN, learning_rate=0.1))
    messages: list[str] = []
    result = run(base, tmp_path / "out", watch=Watch(message=messages.append), **stages(RTN))
    assert any("distill starts again with the new settings" in message for message in messages)
    assert digests(result.folder) == whole(base, **stages(RTN))


def test_the_best_state_is_kept(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Far too high a rate: what was best on held-out text is what is written, and patience ends it."""
    settings = {"learning_rate": 0.3, "evaluate_every": 1, "held_out": 2, "patience": 2, "num_steps": 12, "warmup": 0}
    result = run(base, tmp_path / "out", **stages(RTN, **settings))
    looks = open_model(result.folder).lineage[-1]["training"]["held_out"]
    assert len(looks) < 12
    losses = [loss for _, loss in looks]
    assert min(losses[:-2]) <= min(losses[-2:])


RUN = """
import sys
import torch
from decoct.training import loop
torch.set_num_threads(1)
loop._SAVE_SECONDS = loop._SAVE_SHARE = 0.0
import decoct
decoct.compress(sys.argv[1], {recipe!r}, sys.argv[2])
"""


def started(base: Path, out: Path, recipe: dict[str, Any]) -> "subprocess.Popen[str]":
    """A process of its own, once it has written a checkpoint."""
    code = RUN.format(recipe=recipe)
    process = subprocess.Popen([sys.executable, "-c", code, str(base), str(out)], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(out.rglob("tuning.safetensors")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_or_interrupted_it_goes_on(how: signal.Signals, base: Path, tmp_path: Path) -> None:
    recipe = {
        "data": {"source": str(base.parent / "text.txt"), "num_sequences": 4, "sequence_length": 16},
        **stages(RTN, num_steps=60),
    }
    process = started(base, tmp_path / "out", recipe)
    os.kill(process.pid, how)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode != 0
    if how == signal.SIGINT:
        assert "KeyboardInterrupt" in errors
    assert not (tmp_path / "out" / "config.json").exists()
    result = decoct.compress(base, recipe, tmp_path / "out")
    expected = decoct.compress(base, recipe, tmp_path / "whole")
    assert result.losses == expected.losses
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


# Time and plans


def test_minutes_end_it(base: Path, tmp_path: Path) -> None:
    result = run(base, tmp_path / "out", **stages(RTN, num_steps=100_000, minutes=0.01))
    assert 1 <= len(result.losses) < 5_000
    planned = decoct.plan(base, stages(RTN, num_steps=100_000, minutes=0.5))
    assert planned.stages[-1].seconds <= 30


def planned(base: Path, *settings: str, **changes: Any) -> Any:
    data = {"source": str(base.parent / "text.txt"), "num_sequences": 4, "sequence_length": 16}
    return decoct.plan(base, {"data": data, **stages(RTN, **changes)}, settings=settings)


def test_the_plan_counts(base: Path) -> None:
    usual = planned(base).stages[-1]
    assert usual.kind == "distill"
    assert usual.output_bytes == planned(base).stages[0].output_bytes
    more = planned(base, num_steps=40).stages[-1]
    assert more.seconds == pytest.approx(10 * usual.seconds, rel=0.01)
    assert planned(base, batch_size=64).stages[-1].peak_bytes > usual.peak_bytes
    assert planned(base, train=["norms"]).stages[-1].checkpoint_bytes < usual.checkpoint_bytes
    kept, again = (planned(base, batch_size=32, recompute=each).stages[-1].peak_bytes for each in (False, True))
    assert kept > again


WRONG: list[tuple[dict[str, Any], tuple[str, ...], str]] = [
    ({"loss": "forward_lk"}, (), "unknown loss 'forward_lk'; did you mean 'forward_kl'"),
    ({"data": "nowhere.txt"}, (), "nowhere.txt does not exist"),
    ({"sequence_length": 4096}, (), "sequence_length 4096 is more than the model's limit"),
    ({"batch_size": 1_000_000}, (), "needs about .* of memory, the budget allows"),
    ({"teacher": "nowhere"}, (), "nowhere"),
]


@pytest.mark.parametrize(("changes", "settings", "message"), WRONG)
def test_refused_while_planning(changes: dict[str, Any], settings: tuple[str, ...], message: str, base: Path) -> None:
    with pytest.raises(ValueError, match=f"^[^\n]*{message}[^\n]*$"):
        planned(base, *settings, **changes)


def test_a_compressed_model_does_not_teach_itself(base: Path, tmp_path: Path) -> None:
    out = run(base, tmp_path / "out", RTN).folder
    with pytest.raises(ValueError, match="is compressed already, so it cannot teach itself; name the model"):
        decoct.plan(out, {"stages": [DISTILL]})


def test_a_teacher_with_another_tokenizer(base: Path, tmp_path: Path) -> None:
    other = make_base(tmp_path, vocab_size=80)
    with pytest.raises(ValueError, match=r"has another tokenizer than .*take a teacher of the same family"):
        planned(base, teacher=str(other))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 0}, "learning_rate must lie between 0 and 1"),
        ({"batch_size": 0}, "must be at least 1"),
        ({"train": []}, "train is empty"),
        ({"train": ["matrices", "lora"]}, "exclude each other"),
        ({"patience": 2}, "patience needs evaluate_every"),
        ({"replay": 8}, "replay needs evaluate_every"),
        ({"minutes": 0}, "minutes must be more than 0"),
        ({"schedule": "cosin"}, "schedule"),
        ({"warmup": 2.0}, "fractions"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build_method("distill", settings, "stages[0]")


def test_schedules() -> None:
    rates = {
        name: [Distill(schedule=name, warmup=0.1, decay=0.2, learning_rate=0.01).rate(step, 100) for step in range(100)]
        for name in ("cosine", "linear", "constant", "wsd")
    }
    for name, found in rates.items():
        assert found[0] == pytest.approx(0.001, rel=0.02), name
        assert found[4] == pytest.approx(0.005, rel=0.06), name
    assert rates["constant"][-1] == 0.01
    assert rates["wsd"][79] == 0.01
    assert rates["wsd"][90] == pytest.approx(0.005)
    assert rates["linear"][50] == pytest.approx(0.005)
    assert rates["cosine"][50] == pytest.approx(0.005)
    assert rates["cosine"][-1] < 1e-5
    assert Distill(num_tokens=1000, batch_size=2, accumulate=5).steps(10) == 10
    assert Distill(num_tokens=1000, num_steps=7).steps(10) == 7


def test_the_whole_model_is_described(base: Path) -> None:
    found: Model | None = planned(base).result
    assert found is not None
    assert found.described

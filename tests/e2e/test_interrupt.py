"""The command itself, on a real model, killed and interrupted."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from decoct.model import open_model
from tests.engine.running import digests

DECOCT = [str(Path(sys.executable).parent / "decoct"), "--threads", "1"]
RECIPE = ["--preset", "w4", "--set", "gptq.group_size=4", "--set", "rtn.group_size=8"]
TOKENS = ["--set", "data.num_sequences=64", "--set", "data.sequence_length=256"]


def command(stories: Path, story_text: Path, out: Path) -> list[str]:
    return [*DECOCT, "compress", str(stories), *RECIPE, *TOKENS, "--data", str(story_text), "-o", str(out)]


def start(arguments: list[str]) -> subprocess.Popen[str]:
    """Ctrl-C reaches it, though tests that run in the background hand down that they ignore it."""
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)


def wait_for(process: subprocess.Popen[str], path: Path, seconds: float = 240) -> None:
    """Until a file is there or the process has ended."""
    end = time.monotonic() + seconds
    while not path.exists() and process.poll() is None:
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.005)


def test_ctrl_c(stories: Path, story_text: Path, tmp_path: Path) -> None:
    arguments = command(stories, story_text, tmp_path / "out")
    process = start(arguments)
    wait_for(process, tmp_path / "out" / ".run" / "stage-0" / "journal.jsonl")
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=240)
    assert process.returncode == 1, stderr
    assert stdout == ""
    last = stderr.strip().splitlines()[-1]
    assert last == "error: stopped; nothing finished is lost: run the same command again to go on"
    assert "Traceback" not in stderr
    assert not (tmp_path / "out" / "config.json").exists()
    shown = subprocess.run([*DECOCT, "inspect", str(tmp_path / "out")], capture_output=True, text=True, check=False)
    assert "was interrupted; run the same command again to finish it" in shown.stderr


@pytest.mark.e2e
def test_killed_at_random(stories: Path, story_text: Path, tmp_path: Path) -> None:
    """Five kills at random moments of the work, then to the end: the same bits as without."""
    whole = command(stories, story_text, tmp_path / "whole")
    started = time.monotonic()
    subprocess.run(whole, check=True, capture_output=True)
    summary = json.loads((tmp_path / "whole" / "decoct-run.json").read_text())
    chance = random.Random(0)  # noqa: S311 - no secret
    arguments = command(stories, story_text, tmp_path / "out")
    killed = 0
    for _ in range(5):
        process = start(arguments)
        wait_for(process, tmp_path / "out" / ".run" / "lock")
        time.sleep(chance.uniform(0.0, max(0.2, summary["seconds"] / 2)))
        process.kill()
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
        if not (tmp_path / "out" / ".run").exists():
            break
    assert killed >= 2, f"the machine is too fast: {time.monotonic() - started} s"
    if (tmp_path / "out" / ".run").exists():
        subprocess.run(arguments, check=True, capture_output=True)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    assert open_model(tmp_path / "out").bits_per_weight == open_model(tmp_path / "whole").bits_per_weight


@pytest.mark.e2e
def test_a_second_process_waits_its_turn(stories: Path, story_text: Path, tmp_path: Path) -> None:
    arguments = command(stories, story_text, tmp_path / "out")
    first = start(arguments)
    wait_for(first, tmp_path / "out" / ".run" / "stage-0" / "journal.jsonl")
    first.send_signal(signal.SIGSTOP)
    try:
        for extra in ([], ["--fresh"]):
            second = subprocess.run([*arguments, *extra], capture_output=True, text=True, check=False)
            assert second.returncode == 1
            assert "another decoct process is writing to" in second.stderr
    finally:
        first.send_signal(signal.SIGCONT)
    first.communicate(timeout=300)
    assert first.returncode == 0
    assert open_model(tmp_path / "out").described


@pytest.mark.e2e
def test_a_real_model_from_end_to_end(stories: Path, story_text: Path, tmp_path: Path) -> None:
    """Compress, evaluate, export, evaluate the export: 8 bits cost next to nothing, 4 bits little."""

    def run(*arguments: object) -> dict[str, float]:
        done = subprocess.run(
            [*DECOCT, *(str(each) for each in arguments), "--json"], capture_output=True, text=True, check=True
        )
        return dict(json.loads(done.stdout))

    measure = ["--text", story_text, "--windows", 20, "--length", 256]
    base = run("evaluate", stories, *measure)
    found = {}
    for bits in (8, 4, 3):
        settings = [*RECIPE[2:], "--set", f"gptq.bits={bits}", *TOKENS, "--data", story_text]
        run("compress", stories, "--preset", "w4", *settings, "-o", tmp_path / f"w{bits}")
        found[bits] = run("evaluate", tmp_path / f"w{bits}", "--against", stories, *measure)
    assert found[8]["kl_mean"] < 0.01 < found[3]["kl_mean"]
    assert found[8]["kl_mean"] < found[4]["kl_mean"] < found[3]["kl_mean"]
    assert found[8]["perplexity"] == pytest.approx(base["perplexity"], rel=0.01)
    assert found[4]["perplexity"] < 1.1 * base["perplexity"]
    assert found[3]["nbytes"] < found[4]["nbytes"] < found[8]["nbytes"] < base["nbytes"]
    run("export", tmp_path / "w4", "--to", "dense", "-o", tmp_path / "dense")
    dense = run("evaluate", tmp_path / "dense", *measure)
    assert dense["perplexity"] == pytest.approx(found[4]["perplexity"], rel=1e-3)

"""`decoct bench`: figures of real processes, in turn."""

from pathlib import Path

from decoct.engine.budget import peak_resident_bytes
from decoct.serving.bench import measure_bandwidth
from tests.cli.test_commands import answer, invoke

QUICK = ["--prompt-tokens", 8, "--tokens", 4, "--rounds", 1]


def test_bench_measures_both(base: Path, compressed: Path) -> None:
    found = answer("bench", compressed, "--against", base, *QUICK)
    for key in ("decode_tokens_per_second", "prefill_tokens_per_second", "time_to_first_token", "bandwidth_share"):
        assert found[key] > 0
    assert (found["engine"], found["baseline"]["engine"]) == ("decoct", "eager")
    assert found["peak_memory_bytes"] > found["loaded_memory_bytes"] > 10 << 20
    assert found["threads"] >= 1
    ratio = found["decode_tokens_per_second"] / found["baseline"]["decode_tokens_per_second"]
    assert found["decode_times_baseline"] == ratio
    assert found["weight_nbytes"] < found["baseline"]["weight_nbytes"]


def test_bench_without_a_baseline_and_refusals(base: Path) -> None:
    shown = invoke("bench", base, "--no-baseline", *QUICK)
    assert shown.exit_code == 0, shown.stderr
    assert "one sequence" in shown.stdout
    assert "eager transformers" not in shown.stdout
    wrong = invoke("bench", base, "--prompt-tokens", 5000)
    assert wrong.exit_code == 1
    assert "more than the model's limit of 1024 tokens" in wrong.stderr
    assert "did you mean decoct?" in invoke("bench", base, "--engine", "decot").stderr


def test_the_machine() -> None:
    assert 1e8 < measure_bandwidth(1) < 1e13
    assert peak_resident_bytes() > 10 << 20

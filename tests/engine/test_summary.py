"""What stands out in a run is reported by name."""

from pathlib import Path

import pytest

from decoct.console import Console
from decoct.engine.summary import outlying_blocks
from tests.engine.running import make_base, run


def by_block(*errors: float) -> dict[str, float]:
    return {f"block {number}": error for number, error in enumerate(errors)}


def test_a_block_that_stands_out_is_named() -> None:
    assert outlying_blocks(by_block(0.01, 0.01, 0.2, 0.01, 0.02)) == {"block 2": pytest.approx(20)}
    assert outlying_blocks(by_block(0.06, 0.01, 0.01)) == {"block 0": pytest.approx(6)}


def test_slow_growth_equal_errors_and_other_parts_are_not() -> None:
    assert outlying_blocks(by_block(*(0.01 * 1.5**n for n in range(10)))) == {}
    assert outlying_blocks(by_block(0.0, 0.0, 0.0)) == {}
    assert outlying_blocks(by_block(0.5)) == {}
    assert outlying_blocks({"embedding": 9.0, **by_block(0.01, 0.01), "lm_head": 9.0}) == {}


def test_among_lossless_blocks_any_error_stands_out() -> None:
    assert outlying_blocks(by_block(0.0, 0.01, 0.0)) == {"block 1": float("inf")}


def test_the_run_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rough = [{"match": "1.*", "rtn": {"bits": 2, "group_size": 8}}, {"match": "*", "rtn": {"bits": 8, "group_size": 8}}]
    result = run(make_base(tmp_path), tmp_path / "out", {"linear": rough})
    assert list(result.outlying) == ["block 1"]
    Console.for_stderr().result(result)
    shown = " ".join(capsys.readouterr().err.split())
    assert "warning: block 1 has an error of" in shown
    assert 'match: "1.*"' in shown

"""Post-training quantization on the testbed, method by method and bit by bit; fills bench/results/quantization.jsonl.

usage: quantization.py --model TESTBED --calibration c4.utf8 --text wiki.test.raw [--work DIR] [--rows NAME ...]
"""

from typing import Any

from rows import HERE, Rows, Stages, fill, linear


def grid(bits: int, **more: Any) -> dict[str, Any]:
    """Groups of 64, symmetric."""
    return {"bits": bits, "group_size": 64, "symmetric": True, **more}


def awq(bits: int) -> Stages:
    """Rescaling, then rounding to nearest with clips where the paper clips."""
    queries = {"match": ["attn.q", "attn.k"], "rtn": grid(bits)}
    return [{"blocks": [{"awq": grid(bits)}, {"linear": [queries, {"match": "*", "awq_clip": grid(bits)}]}]}]


def steps(*blocks: dict[str, Any]) -> Stages:
    """One streamed pass."""
    return [{"blocks": list(blocks)}]


def then_tuned(stages: Stages, **settings: Any) -> Stages:
    """Followed by tuning end to end."""
    return [*stages, {"e2e_qp": settings}]


ROWS: Rows = {}
for b in (4, 3, 2):
    ROWS = {
        **ROWS,
        f"rtn {b} bit": ("quick", linear({"rtn": grid(b)})),
        f"awq {b} bit": ("quick", awq(b)),
        f"awq, then gptq {b} bit": ("quick", steps({"awq": grid(b)}, {"linear": {"gptq": grid(b)}})),
        f"gptq {b} bit": ("quick", linear({"gptq": grid(b)})),
        f"gptaq {b} bit": ("quick", linear({"gptaq": grid(b)})),
        f"gptq, then autoround {b} bit": ("quick", steps({"linear": {"gptq": grid(b)}}, {"autoround": {}})),
        f"gptq, then e2e_qp {b} bit": ("quick", then_tuned(linear({"gptq": grid(b)}))),
    }

if __name__ == "__main__":
    fill(ROWS, HERE / "results" / "quantization.jsonl", __doc__)

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


def qtip(bits: int) -> Stages:
    """Two scales a row and column, nothing else beside the codes."""
    return linear({"qtip": {"bits": bits, "state_bits": 10}})


def inputs(first: list[dict[str, Any]], **settings: Any) -> Stages:
    """Weights as `first` makes them, inputs rounded."""
    return steps(*first, {"linear": {"inputs": settings}})


def cache(**policy: Any) -> Stages:
    """Weights as they are."""
    return [{"cache": policy}]


PLAIN = {"levels": "uniform", "outliers": 0}
TABLE = [{"linear": {"rtn": {"bits": 8, "group_size": "channel"}}}]
GPTQ4 = [{"linear": {"gptq": grid(4)}}]
CLIPPED = {"bits": 4, "group_size": "token", "clip_ratio": 0.9}
ROWS: Rows = {
    "qtip 4 bit": ("standard", qtip(4)),
    "qtip 3 bit": ("standard", qtip(3)),
    "qtip 2 bit": ("quick", qtip(2)),
    "gptq 2 bit, zero points": ("quick", linear({"gptq": {**grid(2), "symmetric": False}})),
    "w8a8": ("quick", inputs(TABLE, bits=8)),
    "smoothquant w8a8": ("quick", inputs([{"smoothquant": {"alpha": 0.5}}, *TABLE], bits=8)),
    "kivi 8 bit, window 0": ("quick", cache(kivi={"bits": 8, "window": 0})),
    "kivi 4 bit, window 0": ("quick", cache(kivi={"bits": 4, "window": 0})),
    "kivi 2 bit, window 0": ("quick", cache(kivi={"bits": 2, "window": 0})),
    "kivi 2 bit": ("quick", cache(kivi={"bits": 2})),
    "rotated_int4, window 0": ("quick", cache(rotated_int4={"bits": 4, "window": 0})),
    "gptq w4a4": ("quick", inputs(GPTQ4, **CLIPPED)),
    "quarot, gptq w4a4": ("quick", inputs([{"quarot": {}}, *GPTQ4], **CLIPPED)),
    "quarot, gptq w4a4kv4": (
        "quick", [*inputs([{"quarot": {}}, *GPTQ4], **CLIPPED), *cache(rotated_int4={"bits": 4})]
    ),
    "gptq w4a8": ("quick", inputs(GPTQ4, bits=8)),
    "fp8": ("quick", inputs([{"linear": {"mxfp": {"format": "fp8"}}}], format="fp8")),
    "mxfp4": ("quick", inputs([{"linear": {"mxfp": {"format": "mxfp4"}}}], format="mxfp4")),
    "nvfp4": ("quick", inputs([{"linear": {"mxfp": {"format": "nvfp4"}}}], format="nvfp4")),
    "llm_int8": ("quick", linear({"llm_int8": {}})),
}  # fmt: skip
for b in (4, 3, 2):
    ROWS = {
        **ROWS,
        f"rtn {b} bit": ("quick", linear({"rtn": grid(b)})),
        f"hqq {b} bit": ("quick", linear({"hqq": {"bits": b, "group_size": 64}})),
        f"awq {b} bit": ("quick", awq(b)),
        f"awq, then gptq {b} bit": ("quick", steps({"awq": grid(b)}, {"linear": {"gptq": grid(b)}})),
        f"gptq {b} bit": ("quick", linear({"gptq": grid(b)})),
        f"gptaq {b} bit": ("quick", linear({"gptaq": grid(b)})),
        f"squeezellm {b} bit": ("quick", linear({"squeezellm": {"bits": b}})),
        f"gptq, then autoround {b} bit": ("quick", steps({"linear": {"gptq": grid(b)}}, {"autoround": {}})),
        f"kvquant {b} bit, window 0": ("quick", cache(kvquant={"bits": b, "window": 0, **PLAIN})),
        f"kvquant {b} bit, window 0, learned levels": ("quick", cache(kvquant={"bits": b, "window": 0, "outliers": 0})),
        f"kvquant {b} bit, window 0, outliers": ("quick", cache(kvquant={"bits": b, "window": 0, "levels": "uniform"})),
        f"kvquant {b} bit, window 0, both": ("quick", cache(kvquant={"bits": b, "window": 0})),
        f"gptq, then e2e_qp {b} bit": ("quick", then_tuned(linear({"gptq": grid(b)}))),
    }
ROWS = {
    **ROWS,
    "qtip 2 bit, then e2e_qp": ("quick", then_tuned(qtip(2))),
    "billm": ("quick", linear({"billm": {}})),
    "ternary": ("quick", linear({"ternary": {"group_size": 64}})),
    "onebit": ("quick", linear({"onebit": {}})),
}

if __name__ == "__main__":
    fill(ROWS, HERE / "results" / "quantization.jsonl", __doc__)

"""Post-training quantization on the testbed, method by method and bit by bit; fills bench/results/quantization.jsonl.

usage: quantization.py --model TESTBED --calibration c4.utf8 --text wiki.test.raw [--work DIR] [--rows NAME ...]
"""

import re
from importlib.resources import files
from typing import Any

import yaml
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


def preset(name: str) -> Stages:
    """What a preset of decoct does, but for its calibration text."""
    return list(yaml.safe_load(files("decoct").joinpath("recipes", f"{name}.yaml").read_text())["stages"])


UNIFORM = {"window": 0, "levels": "uniform", "outliers": 0}
RTN8 = [{"linear": {"rtn": {"bits": 8, "group_size": "channel"}}}]
RTN4, GPTQ4 = [{"linear": {"rtn": grid(4)}}], [{"linear": {"gptq": grid(4)}}]
CLIPPED = {"bits": 4, "group_size": "token", "clip_ratio": 0.9}
ROWS: Rows = {
    "qtip 4 bit": ("standard", qtip(4)),
    "qtip 3 bit": ("standard", qtip(3)),
    "qtip 2 bit": ("standard", qtip(2)),
    **{f"gptq {b} bit, standard": ("standard", linear({"gptq": grid(b)})) for b in (4, 3, 2)},
    **{f"autoround {b} bit, standard": ("standard", steps({"autoround": grid(b)})) for b in (4, 3, 2)},
    **{
        f"gptq, then autoround {b} bit, standard": ("standard", steps({"linear": {"gptq": grid(b)}}, {"autoround": {}}))
        for b in (4, 3, 2)
    },
    "gptq, then block_ap 2 bit, zero points, standard": (
        "standard", steps({"linear": {"gptq": {**grid(2), "symmetric": False}}}, {"block_ap": {}})
    ),
    "gptq, then block_ap 2 bit, standard": ("standard", steps({"linear": {"gptq": grid(2)}}, {"block_ap": {}})),
    "gptq, then block_ap, then e2e_qp 2 bit, standard": (
        "standard", then_tuned(steps({"linear": {"gptq": grid(2)}}, {"block_ap": {}}))
    ),
    "qtip 2 bit, then e2e_qp, standard": ("standard", then_tuned(qtip(2))),
    # Inputs rounded as well. Token by token, symmetric, where nothing else is said.
    "w8a8": ("quick", inputs(RTN8, bits=8)),
    "smoothquant w8a8": ("quick", inputs([{"smoothquant": {"alpha": 0.5}}, *RTN8], bits=8)),
    "llm_int8": ("quick", linear({"llm_int8": {}})),
    "fp8": ("quick", inputs([{"linear": {"mxfp": {"format": "fp8"}}}], format="fp8")),
    "mxfp8": ("quick", inputs([{"linear": {"mxfp": {"format": "mxfp8"}}}], format="mxfp8")),
    "mxfp4": ("quick", inputs([{"linear": {"mxfp": {"format": "mxfp4"}}}], format="mxfp4")),
    "nvfp4": ("quick", inputs([{"linear": {"mxfp": {"format": "nvfp4"}}}], format="nvfp4")),
    "zeroquant w4a8": ("quick", inputs(RTN4, bits=8)),
    "gptq w4a8": ("quick", inputs(GPTQ4, bits=8)),
    "rtn w4a4": ("quick", inputs(RTN4, **CLIPPED)),
    "gptq w4a4": ("quick", inputs(GPTQ4, **CLIPPED)),
    "quarot, rtn w4a4": ("quick", inputs([{"quarot": {}}, *RTN4], **CLIPPED)),
    "quarot, gptq w4a4": ("quick", inputs([{"quarot": {}}, *GPTQ4], **CLIPPED)),
    "quarot, gptq w4a4kv4": (
        "quick", [*inputs([{"quarot": {}}, *GPTQ4], **CLIPPED), *cache(rotated_int4={"bits": 4})]
    ),
    # The cache alone; with a window of 0 no key or value is spared but those that do not fill a group.
    **{f"kivi {b} bit, window 0": ("quick", cache(kivi={"bits": b, "window": 0})) for b in (8, 4, 2)},
    "kivi 2 bit": ("quick", cache(kivi={"bits": 2})),
    **{f"kvquant {b} bit, window 0": ("quick", cache(kvquant={"bits": b, "window": 0})) for b in (4, 3, 2)},
    **{f"kvquant {b} bit, window 0, uniform": ("quick", cache(kvquant={"bits": b, **UNIFORM})) for b in (4, 2)},
    "kvquant 2 bit, window 0, no outliers": ("quick", cache(kvquant={"bits": 2, "window": 0, "outliers": 0})),
    **{f"rotated_int4 {b} bit, window 0": ("quick", cache(rotated_int4={"bits": b, "window": 0})) for b in (8, 4, 2)},
    "fp8_cache": ("quick", cache(fp8_cache={})),
}  # fmt: skip
for b in (8, 4, 3, 2):
    ROWS |= {
        f"rtn {b} bit": ("quick", linear({"rtn": grid(b)})),
        f"hqq {b} bit": ("quick", linear({"hqq": {"bits": b, "group_size": 64}})),
        f"gptq {b} bit": ("quick", linear({"gptq": grid(b)})),
        f"gptaq {b} bit": ("quick", linear({"gptaq": grid(b)})),
        f"awq {b} bit": ("quick", awq(b)),
        f"owq {b} bit": ("quick", linear({"owq": grid(b)})),
        f"spqr {b} bit": ("quick", linear({"spqr": {"bits": b}})),
        f"autoround {b} bit": ("quick", steps({"autoround": grid(b)})),
        f"flexround {b} bit": ("quick", steps({"flexround": grid(b)})),
        f"lrq {b} bit": ("quick", steps({"lrq": grid(b)})),
        f"omniquant {b} bit": ("quick", steps({"omniquant_let": grid(b)}, {"omniquant": grid(b)})),
    }
for b in (4, 3, 2):
    ROWS |= {
        f"squeezellm {b} bit": (
            "quick",
            linear({"squeezellm": {"bits": b}}),
        ),  # at 8 a row's table is as large as its codes
        f"gptq, guided {b} bit": ("quick", linear({"gptq": {**grid(b), "guided": 4}})),
        f"awq, then gptq {b} bit": ("quick", steps({"awq": grid(b)}, {"linear": {"gptq": grid(b)}})),
        f"gptq, then autoround {b} bit": ("quick", steps({"linear": {"gptq": grid(b)}}, {"autoround": {}})),
        f"gptq, then block_ap {b} bit": ("quick", steps({"linear": {"gptq": grid(b)}}, {"block_ap": {}})),
        f"gptq, then e2e_qp {b} bit": ("quick", then_tuned(linear({"gptq": grid(b)}))),
    }
ROWS |= {
    "gptq 2 bit, zero points": ("quick", linear({"gptq": {**grid(2), "symmetric": False}})),
    "gptq, then block_ap 2 bit, zero points": (
        "quick", steps({"linear": {"gptq": {**grid(2), "symmetric": False}}}, {"block_ap": {}})
    ),
    **{f"gptq {bits} bits, searched": ("quick", linear({"gptq": grid(4)}), {"bits": bits}) for bits in (4.25, 3.25)},
    "spinquant, gptq w4a4": ("quick", inputs([{"spinquant": {}}, *GPTQ4], **CLIPPED)),
    "aqlm 2 bit": ("quick", linear({"aqlm": {}})),
    "aqlm 3 bit": ("quick", linear({"aqlm": {"num_codebooks": 3}})),
    "qtip 2 bit, then e2e_qp": ("quick", then_tuned(qtip(2))),
    "billm": ("quick", linear({"billm": {}})),
    "pb_llm": ("quick", linear({"pb_llm": {}})),
    "ternary": ("quick", linear({"ternary": {"group_size": 64}})),
    "onebit": ("quick", linear({"onebit": {}})),
}  # fmt: skip

for name in ("w8", "w4", "w4-autoround", "w4-best", "w3", "w3-best", "w2-best", "ternary", "w8a8", "w4a4kv4", "kv4"):
    ROWS |= {f"preset {name}": ("quick", preset(name))}
for b in (8, 6, 4, 3):
    both = [
        {"match": ["embed", "lm_head"], "rtn": {"bits": b, "group_size": 64}},
        {"match": "*", "gptq": grid(4)},
    ]
    ROWS |= {f"gptq 4 bit, embedding {b} bit": ("quick", linear(both))}

CACHES = ("kivi", "kvquant", "rotated_int4", "fp8_cache")
LOW_BITS = ("billm", "pb_llm", "ternary", "onebit")


def kind(row: dict[str, Any]) -> str:
    """The table of bench/quantization.md that a row belongs to."""
    name = row["row"]
    method = name.split(" ")[0]
    if row["protocol"] == "standard":
        return "standard"
    if method == "preset":
        return "presets"
    if "embedding" in name:
        return "embeddings"
    if method in CACHES:
        return "caches"
    if method in LOW_BITS:
        return "about one bit"
    if name == "llm_int8" or any("inputs" in str(step) for step in ROWS.get(name, ("", []))[1]):
        return "inputs"
    return "weights"


def order(row: dict[str, Any]) -> tuple[int, float]:
    """Most bits first, of equal ones the least divergence."""
    bits = re.search(r"(\d) bit", row["row"])
    return -int(bits[1]) if bits and kind(row) in ("weights", "standard", "caches") else 0, row["kl_mean"]


if __name__ == "__main__":
    fill(ROWS, HERE / "results" / "quantization.jsonl", __doc__, HERE / "quantization.md", kind, order)

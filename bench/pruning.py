"""Pruning on the testbed, from single weights to whole blocks; fills bench/results/pruning.jsonl.

usage: pruning.py --model TESTBED --calibration c4.utf8 --text wiki.test.raw [--work DIR] [--rows NAME ...]
"""

import re
from typing import Any

from rows import HERE, Rows, Stages, fill, linear

DEPTH = ("shortgpt", "angular", "sleb", "evopress", "blockpruner")
WIDTH = ("magnitude_width", "minitron", "flap", "llm_pruner", "ziplm")
SINGLE = ("magnitude", "wanda", "ria", "sparsegpt", "alps")


def depth(method: str, num_dropped: int, **settings: Any) -> Stages:
    """Blocks out of 30."""
    return [{method: {"num_dropped": num_dropped, **settings}}]


def width(method: str, keep: float, **settings: Any) -> Stages:
    """Neurons out, of the whole model's parameters."""
    return [{method: {"keep": keep, **settings}}]


ROWS: Rows = {
    "width 20 %, ziplm": ("standard", width("ziplm", 0.8)),
    "depth 4, sleb": ("standard", depth("sleb", 4)),
    "depth 4, sleb, bridge": ("standard", depth("sleb", 4, bridge=True)),
    **{
        f"{m} {percent} %, standard": ("standard", linear({m: {"sparsity": percent / 100}}))
        for percent in (50, 60)
        for m in ("magnitude", "wanda", "sparsegpt", "alps")
    },
    **{f"{m} 2:4, standard": ("standard", linear({m: {"n": 2, "m": 4}})) for m in ("wanda", "sparsegpt", "alps")},
    **{f"depth {n}, shortgpt, standard": ("standard", depth("shortgpt", n)) for n in (4, 7)},
    "depth 7, sleb, standard": ("standard", depth("sleb", 7)),
    "width 20 %, magnitude_width, standard": ("standard", width("magnitude_width", 0.8)),
    **{f"depth 4, {m}": ("quick", depth(m, 4)) for m in DEPTH if m != "sleb"},
    "depth 4, blockpruner, per parameter": ("quick", depth("blockpruner", 4, per_parameter=True)),
    **{f"depth {n}, {m}": ("quick", depth(m, n)) for n in (2, 7, 8) for m in ("shortgpt", "sleb")},
    "depth 8, sleb, bridge": ("quick", depth("sleb", 8, bridge=True)),
    "depth 4, sleb, quick": ("quick", depth("sleb", 4)),
    "depth 4, sleb, bridge, quick": ("quick", depth("sleb", 4, bridge=True)),
    "depth 4, sleb, bridge 64": ("quick", depth("sleb", 4, bridge=64)),
    "depth 4, blockpruner, bridge": ("quick", depth("blockpruner", 4, bridge=True)),
    **{f"width 20 %, {m}, quick": ("quick", width(m, 0.8)) for m in WIDTH},
    **{
        f"width {round(100 - 100 * keep)} %, {m}, quick": ("quick", width(m, keep))
        for keep in (0.9, 0.7)
        for m in ("magnitude_width", "flap", "ziplm")
    },
    **{f"width 20 %, {m}, refitted": ("quick", width(m, 0.8, reconstruct=True)) for m in ("magnitude_width", "flap")},
    **{f"width 20 %, {m}, uneven": ("quick", width(m, 0.8, uneven=True)) for m in ("flap", "ziplm")},
    # 432 and 288 channels: multiples of 8 and of 9 heads. With 504 the model would be larger, since lm_head is untied.
    **{f"slicegpt, {keep} of the hidden size": ("quick", [{"slicegpt": {"keep": keep}}]) for keep in (0.75, 0.5)},
    # 513 of 576 channels: 11 % of the parameters
    **{
        f"width 10 %, hidden channels, {m}": ("quick", width(m, 1.0, keep_hidden=0.9, multiple_of=1))
        for m in ("minitron", "flap", "magnitude_width")
    },
    "width 20 %, a third of the heads, ziplm": ("quick", width("ziplm", 0.8, keep_heads=0.67)),
    **{
        f"{m} {percent} %": ("quick", linear({m: {"sparsity": percent / 100}}))
        for percent in (10, 30, 50, 60, 70)
        for m in (SINGLE if percent >= 50 else ("magnitude", "wanda", "sparsegpt"))
    },
    "wanda 60 %, dsnot": ("quick", linear({"wanda": {"sparsity": 0.6}}, {"dsnot": {}})),
    "obd 60 %": ("quick", linear({"obd": {"sparsity": 0.6}})),
    "sparsegpt 50 %, with gptq 4 bit": ("quick", linear({"sparsegpt": {"sparsity": 0.5, "bits": 4, "group_size": 64}})),
    "sparsegpt 50 %, then gptq 4 bit": (
        "quick",
        linear({"sparsegpt": {"sparsity": 0.5}}, {"gptq": {"bits": 4, "group_size": 64}}),
    ),
    **{
        f"{m} 70 %, owl": ("quick", linear({m: {"sparsity": 0.7, "owl": 0.08}})) for m in ("wanda", "sparsegpt", "alps")
    },
    **{
        f"{m} 60 %, norms": ("quick", [{"blocks": [{"linear": {m: {"sparsity": 0.6}}}, {"norm_tweaking": {}}]}])
        for m in ("wanda", "sparsegpt")
    },
    **{
        f"{m} {percent} %, searched": ("quick", linear({m: {"sparsity": percent / 100}}), {"sparsity": percent / 100})
        for percent, m in ((60, "sparsegpt"), (70, "wanda"), (70, "sparsegpt"))
    },
    **{
        f"{m} {n}:{k}": ("quick", linear({m: {"n": n, "m": k}}))
        for n, k in ((2, 4), (4, 8))
        for m in (SINGLE if k == 4 else ("magnitude", "wanda", "sparsegpt"))
    },
}


def kind(row: dict[str, Any]) -> str:
    """The table of bench/pruning.md that a row belongs to."""
    if row["protocol"] == "standard":
        return "standard"
    first = row["row"].split(" ")[0]
    if first == "slicegpt,":
        return "width"
    return first if first in ("depth", "width") else "single weights"


def order(row: dict[str, Any]) -> tuple[str, float]:
    """By how much goes, then by divergence."""
    found = re.search(r"depth \d|width \d+ %|\d+ %|\d:\d", row["row"])
    return "" if found is None else found[0], row["kl_mean"]


if __name__ == "__main__":
    fill(ROWS, HERE / "results" / "pruning.jsonl", __doc__, HERE / "pruning.md", kind, order)

"""Quality of the first methods on the testbed, and of what they give together; fills bench/results/spine.jsonl.

usage: spine.py --model TESTBED --calibration c4.utf8 --text wiki.test.raw [--work DIR] [--rows NAME ...]
"""

from rows import HERE, Rows, fill, linear

GROUPS = {"group_size": 64, "symmetric": True}
ROWS: Rows = {
    "gptq 4 bit": ("standard", linear({"gptq": {"bits": 4, **GROUPS}})),
    "rtn 4 bit": ("standard", linear({"rtn": {"bits": 4, **GROUPS}})),
    "gptq 3 bit": ("standard", linear({"gptq": {"bits": 3, **GROUPS}})),
    "rtn 3 bit": ("standard", linear({"rtn": {"bits": 3, **GROUPS}})),
    "wanda 50 %": ("standard", linear({"wanda": {"sparsity": 0.5}})),
    "svd_llm keep 0.8": ("standard", linear({"svd_llm": {"keep": 0.8}})),
    "gptq 4 bit, quick": ("quick", linear({"gptq": {"bits": 4, **GROUPS}})),
    "gptq 4 bit, min-max scales": ("quick", linear({"gptq": {"bits": 4, "clip_search": False, **GROUPS}})),
    "gptq 3 bit, then eora rank 16": ("quick", linear({"gptq": {"bits": 3, **GROUPS}}, {"eora": {"rank": 16}})),
    "wanda 50 %, then gptq 4 bit": ("quick", linear({"wanda": {"sparsity": 0.5}}, {"gptq": {"bits": 4, **GROUPS}})),
    "svd_llm keep 0.8, then rtn 8 bit": (
        "quick",
        linear({"svd_llm": {"keep": 0.8}}, {"rtn": {"bits": 8, "group_size": "channel"}}),
    ),
    "rtn 8 bit, embedding too": ("quick", linear({"match": ["embed", "*"], "rtn": {"bits": 8, **GROUPS}})),
}

if __name__ == "__main__":
    fill(ROWS, HERE / "results" / "spine.jsonl", __doc__)

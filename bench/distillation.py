"""What training brings back on the testbed, healed row by healed row; fills bench/results/distillation.jsonl.

usage: distillation.py --model TESTBED --calibration c4.utf8 --text wiki.test.raw [--work DIR] [--rows NAME ...]

Every damage is measured as it is, after distillation from the uncompressed model, and after plain fine-tuning on the same
tokens. Training text is the calibration text, read further; measured is on another text, as in the other pages.
"""

import os
from typing import Any

from rows import HERE, Stages, fill, linear

TOKENS = int(os.environ.get("DECOCT_TRAIN_TOKENS", "400000"))
SPENT = f"{TOKENS // 1000}k tokens"
SECOND = os.environ.get("DECOCT_SECOND_TEACHER")  # a second teacher's folder, with the same tokenizer
EVERYTHING = ["matrices", "norms", "ends"]


def grid(bits: int) -> dict[str, Any]:
    """Groups of 64, symmetric."""
    return {"bits": bits, "group_size": 64, "symmetric": True}


def training(tokens: int = TOKENS, **more: Any) -> dict[str, Any]:
    """Settings of every row that trains; what differs is in its name."""
    return {
        "num_tokens": tokens,
        "batch_size": 4,
        "sequence_length": 512,
        "evaluate_every": 25,
        "recompute": False,  # 5.2 GiB at the peak; 3.4 with it, and about a tenth more time
        **more,
    }


def distill(**more: Any) -> Stages:
    """Forward KL from the uncompressed model."""
    return [{"distill": training(**more)}]


def tune(**more: Any) -> Stages:
    """The next token of the text itself."""
    return [{"distill": training(loss="cross_entropy", **more)}]


def qat(bits: float, tokens: int = TOKENS, **more: Any) -> Stages:
    """Latent weights, groups of 64."""
    return [{"qat": training(tokens, bits=bits, group_size=64, **more)}]


QTIP2 = linear({"qtip": {"bits": 2, "state_bits": 10}})
GPTQ2 = linear({"gptq": grid(2)})
DAMAGES: dict[str, tuple[Stages, list[str]]] = {
    "width -20 %": ([{"ziplm": {"keep": 0.8}}], EVERYTHING),
    "depth -4": ([{"sleb": {"num_dropped": 4, "bridge": True}}], EVERYTHING),
    "svd 0.7": (linear({"svd_llm": {"keep": 0.7}}), ["matrices", "norms"]),
    "wanda 60 %": (linear({"wanda": {"sparsity": 0.6}}), ["matrices", "norms"]),
    "qtip 2 bit": (QTIP2, ["matrices", "norms"]),
    "gptq 2 bit": (GPTQ2, ["matrices", "norms"]),
}
ROWS: dict[str, tuple[str, Stages]] = {}
for name, (damage, train) in DAMAGES.items():
    ROWS |= {
        name: ("quick", damage),
        f"{name}, distilled, {SPENT}": ("quick", [*damage, *distill(train=train)]),
        f"{name}, fine-tuned, {SPENT}": ("quick", [*damage, *tune(train=train)]),
    }
ROWS |= {
    f"gptq 2 bit, then qat, {SPENT}": ("quick", [*GPTQ2, *qat(2)]),
    f"qat 2 bit, seq, {SPENT}": ("quick", qat(2)),
    f"qat 2 bit, lsq, {SPENT}": ("quick", qat(2, grid="lsq")),
    f"gptq 2 bit, lora, {SPENT}": ("quick", [*GPTQ2, *distill(train=["lora", "norms"])]),
    f"gptq 2 bit, qa_lora, {SPENT}": ("quick", [*GPTQ2, *distill(train=["qa_lora", "norms"])]),
    "ternary, rounded": ("quick", linear({"ternary": {"group_size": 64}})),
    **{
        f"ternary, qat, {tokens // 1000}k tokens": ("quick", qat(1.58, tokens))
        for tokens in (TOKENS // 8, TOKENS // 4, TOKENS // 2, TOKENS)
    },
    f"binary, qat, {SPENT}": ("quick", qat(1)),
    f"student of half the depth, {SPENT}": ("quick", [{"distilbert": {"keep": 0.5}}, *distill(train=EVERYTHING)]),
    **{
        f"wanda 60 %, {loss}": ("quick", [*DAMAGES["wanda 60 %"][0], *distill(loss=loss, num_steps=50)])
        for loss in (
            "forward_kl", "reverse_kl", "jeffreys", "jsd", "skew_kl", "skew_reverse_kl", "total_variation",
            "cross_entropy",
        )
    },
}  # fmt: skip
for name, settings in {
    "rate 0.0003": {"learning_rate": 3e-4},
    "rate 0.003": {"learning_rate": 3e-3},
    "batches of 1": {"batch_size": 1},
    "batches of 1, rate 0.0005": {"batch_size": 1, "learning_rate": 5e-4},
}.items():
    ROWS[f"width -20 %, distilled, {name}, {SPENT}"] = (
        "quick",
        [*DAMAGES["width -20 %"][0], *distill(train=EVERYTHING, **settings)],
    )
if SECOND is not None:
    damage = DAMAGES["wanda 60 %"][0]
    both = {"teacher": [os.environ.get("DECOCT_TESTBED", ""), SECOND]}
    ROWS |= {
        "wanda 60 %, two teachers, mean": ("quick", [*damage, *distill(**both, teachers="mean")]),
        "wanda 60 %, two teachers, the surest": ("quick", [*damage, *distill(**both, teachers="surest")]),
    }


def kind(row: dict[str, Any]) -> str:
    """The table of bench/distillation.md that a row belongs to."""
    name = row["row"]
    if name.startswith(("ternary", "binary")):
        return "few levels"
    if name.split(", ")[-1].endswith(("kl", "jsd", "jeffreys", "variation", "entropy")):
        return "losses"
    return "two bits" if "2 bit" in name else "healed"


def order(row: dict[str, Any]) -> tuple[str, float]:
    """By what was done first, then by divergence."""
    return row["row"].split(",")[0], row["kl_mean"]


if __name__ == "__main__":
    fill(ROWS, HERE / "results" / "distillation.jsonl", __doc__, HERE / "distillation.md", kind, order)

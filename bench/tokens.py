"""Tokens a second of plain checkpoints in stock transformers, in turn (A B A B); fills bench/results/tokens.jsonl.

usage: tokens.py BASE FOLDER ... [--rounds 3] [--threads 2]
Prefill: 512 tokens at once. Decode: 32 tokens one by one behind them, greedy, with transformers' own cache. bfloat16, batch 1.
Medians of the rounds, each after one run that does not count.
"""

import argparse
import json
import statistics
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rows import HERE
from transformers import AutoModelForCausalLM

PROMPT, ANSWER = 512, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="FOLDER", help="the first is what others are compared with"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval() for folder in args.folders]
    for model in models:
        once(model)
    runs = [[once(model) for model in models] for _ in range(args.rounds)]
    found = [
        {key: statistics.median(r[n][key] for r in runs) for key in ("prefill", "decode")} for n in range(len(models))
    ]
    with (HERE / "results" / "tokens.jsonl").open("a", encoding="utf-8") as handle:
        for folder, model, speed in zip(args.folders, models, found, strict=True):
            record = {
                "folder": folder.name,
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
                **{f"{key}_tokens_per_second": round(value, 2) for key, value in speed.items()},
                **{f"{key}_ratio": round(value / found[0][key], 3) for key, value in speed.items()},
                "threads": args.threads,
                "rounds": args.rounds,
                "date": datetime.now(UTC).isoformat("T", "seconds"),
            }
            handle.write(json.dumps(record) + "\n")
            print(json.dumps(record), flush=True)


@torch.inference_mode()
def once(model: Any) -> dict[str, float]:
    """Tokens a second."""
    tokens = torch.arange(PROMPT).unsqueeze(0) % model.config.vocab_size
    started = time.perf_counter()
    out = model(tokens, use_cache=True, logits_to_keep=1)
    prefilled = time.perf_counter()
    for _ in range(ANSWER):
        out = model(out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values, use_cache=True)
    done = time.perf_counter()
    return {"prefill": PROMPT / (prefilled - started), "decode": ANSWER / (done - prefilled)}


if __name__ == "__main__":
    main()

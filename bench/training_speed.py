"""Throughput and peak memory of one training step: decoct's trainer and transformers' Trainer, side by side.

usage: training_speed.py --model FOLDER --text FILE [--steps 8] [--batch 4] [--length 512] [--rounds 2] [--threads 2]
Both fine-tune all weights of the same model on the same tokens with AdamW, in the model's own dtype or float32, without a
teacher. Each run is a process of its own, and they take turns (A B A B); the first two steps do not count.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any


def ours(args: argparse.Namespace) -> list[float]:
    """Seconds of each step by decoct."""
    import tempfile

    import decoct
    from decoct.engine.job import Watch

    settings = {
        "loss": "cross_entropy", "train": ["matrices", "norms", "ends"], "num_steps": args.steps,
        "batch_size": args.batch, "sequence_length": args.length, "recompute": args.recompute,
    }  # fmt: skip
    found: list[float] = []
    watch = Watch(event=lambda event: found.append(event.seconds) if event.loss is not None else None)
    with tempfile.TemporaryDirectory() as folder:
        recipe = {"data": {"source": str(args.text)}, "stages": [{"distill": settings}]}
        decoct.compress(args.model, recipe, Path(folder) / "out", watch=watch)
    return found


def theirs(args: argparse.Namespace, *, bf16: bool = False) -> list[float]:
    """The same by transformers; `bf16`: products in bfloat16 by autocast, as decoct computes where that is faster."""
    import tempfile

    import torch
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    from decoct.engine.data import text_tokens
    from decoct.model import open_model

    tokens = text_tokens(str(args.text), open_model(args.model), args.steps * args.batch * args.length)
    rows = [{"input_ids": row, "labels": row} for row in tokens.reshape(-1, args.length)]
    found: list[float] = []

    class Clock(TrainerCallback):
        """Notes what each step takes."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.begun = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            found.append(time.perf_counter() - self.begun)

    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder, max_steps=args.steps, per_device_train_batch_size=args.batch, use_cpu=True, report_to=[],
            save_strategy="no", bf16=bf16, gradient_checkpointing=args.recompute, logging_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        Trainer(model, settings, train_dataset=rows, callbacks=[Clock()]).train()  # type: ignore[arg-type]
    return found


SIDES = {"ours": ours, "theirs": theirs, "theirs, bf16": partial(theirs, bf16=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", type=Path, required=True)
    for name, default in (("steps", 8), ("batch", 4), ("length", 512), ("rounds", 2), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--recompute", action="store_true", help="run blocks again for their gradients, in both")
    parser.add_argument("--one", choices=list(SIDES), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        import torch

        torch.set_num_threads(args.threads)
        seconds = SIDES[args.one](args)[2:]
        rate = args.batch * args.length * len(seconds) / sum(seconds)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"who": args.one, "tokens_per_second": round(rate, 1), "peak_mib": round(peak)}))
        return
    for _ in range(args.rounds):
        for who in SIDES:
            done = subprocess.run(
                [sys.executable, *sys.argv, "--one", who], check=True, stdout=subprocess.PIPE, text=True
            )
            print(done.stdout.splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()

"""Peak memory and seconds of a loss on predictions and its gradients: by the kernels, by torch in chunks, with all logits held.

usage: losses.py [--record results/losses.jsonl] [--rounds 3] [--threads 2]
Each run is a process of its own; the three ways take turns (A B C A B C). Memory is the highest resident size while loss and
gradients are computed, less that before (states, heads, and zeros to add the head's gradient to are in it). Linux.
"""

import argparse
import json
import subprocess
import sys
import time
from datetime import UTC, datetime
from itertools import product
from pathlib import Path

CASES = {
    "49k": {"vocab": 49152, "hidden": 576, "tokens": 2048},
    "262k": {"vocab": 262144, "hidden": 640, "tokens": 512},
}

WAYS = ("kernels", "chunks", "all logits")
LOSSES = ("forward_kl", "cross_entropy")


def one(
    way: str, loss: str, dtype: str, vocab: int, hidden: int, tokens: int, train_head: bool, threads: int
) -> dict[str, float]:
    """A loss and its gradients, in this process; states in float32, the head in `dtype`."""
    import torch

    from decoct.losses import Batch, CrossEntropy, ForwardKL, Head, Projected, compiled

    if way == "chunks":
        compiled.can_diverge = lambda *_: False
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    states, teacher = (torch.randn(tokens, hidden) for _ in range(2))
    matrix = (torch.randn(vocab, hidden) * hidden**-0.5).to(getattr(torch, dtype))
    states.requires_grad_()
    matrix.requires_grad_(train_head)
    batch = Batch.of(torch.randint(vocab, (1, tokens)))
    if train_head:
        matrix.grad = torch.zeros_like(matrix)
    Path("/proc/self/clear_refs").write_text("5")  # the highest resident size begins anew
    before = resident("VmRSS")
    started = time.perf_counter()
    if way != "all logits":
        measure = CrossEntropy() if loss == "cross_entropy" else ForwardKL()
        wanted = Projected(teacher, Head(matrix.detach())) if measure.needs_teacher else None
        found = measure(Projected(states, Head(matrix)), wanted, batch)
    else:
        own = torch.log_softmax((states.to(matrix.dtype) @ matrix.T).float(), -1)
        if loss == "cross_entropy":
            terms = -own.gather(1, batch.labels[:, None])[:, 0]
        else:
            with torch.no_grad():
                target = torch.log_softmax((teacher.to(matrix.dtype) @ matrix.T).float(), -1)
            terms = torch.nn.functional.kl_div(own, target, reduction="none", log_target=True).sum(-1)
        found = (terms * batch.weights).sum()
    found.backward()
    seconds = time.perf_counter() - started
    peak = resident("VmHWM")
    norms = [float(each.grad.norm()) for each in (states, matrix) if each.grad is not None]
    return {"value": float(found.detach()), "mib": (peak - before) / 1024, "seconds": seconds, "norms": norms}  # type: ignore[dict-item]


def resident(what: str) -> int:
    """KiB from /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, default=Path(__file__).parent / "results" / "losses.jsonl")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16", help="of the head")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(**json.loads(args.one))))
        return
    args.record.parent.mkdir(exist_ok=True)
    for name, case in CASES.items():
        for train_head, loss, number, way in product((False, True), LOSSES, range(args.rounds), WAYS):
            given = {**case, "loss": loss, "dtype": args.dtype, "way": way, "train_head": train_head}
            given["threads"] = args.threads
            command = [sys.executable, __file__, "--one", json.dumps(given)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            date = datetime.now(UTC).isoformat(timespec="seconds")
            row = {"case": name, **given, "round": number, **json.loads(done.stdout), "date": date}
            with args.record.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()

"""Attention of the compiled kernels and torch's own, forward and backward, in turn (A B A B); fills results/attention.jsonl.

usage: attention.py [--threads 1] [--rounds 7] [--level avx2]
Causal, whole sequences; medians of the rounds, in milliseconds. --level: no newer instructions than these; for torch,
ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 in the environment say the same.
"""

import argparse
import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from statistics import median

import torch
from rows import HERE, machine
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from decoct.native import attend
from decoct.native.library import library

SHAPES = {
    "SmolLM2-135M, 4 x 512 tokens": (4, 9, 3, 64, 512),
    "1.1B, 512 tokens": (1, 32, 4, 64, 512),
    "1.1B, 2048 tokens": (1, 32, 4, 64, 2048),
}
"""Sequences, heads, heads of keys and values, channels, tokens."""


def ours(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """[sequences, tokens, heads, channels]."""
    found = attend(queries, keys, values, scale=queries.shape[3] ** -0.5)
    if found is None:
        raise SystemExit("the compiled kernels do not attend on this processor")
    return found


def theirs(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """The same."""
    return scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True).transpose(1, 2)


def timed(attention: Callable[[Tensor, Tensor, Tensor], Tensor], tensors: list[Tensor]) -> tuple[float, float]:
    """Milliseconds forward and backward."""
    began = time.perf_counter()
    out = attention(*tensors)
    between = time.perf_counter()
    out.backward(torch.ones_like(out))
    return 1e3 * (between - began), 1e3 * (time.perf_counter() - between)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--level")
    args = parser.parse_args()
    kernels = library()
    if args.level and kernels:
        kernels.levels = kernels.levels[: kernels.levels.index(args.level) + 1]
    torch.set_num_threads(args.threads)
    for name, (sequences, heads, kv_heads, channels, tokens) in SHAPES.items():
        for dtype in (torch.bfloat16, torch.float32):
            shapes = [(sequences, count, tokens, channels) for count in (heads, kv_heads, kv_heads)]
            tensors = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
            runs = [[timed(each, tensors) for each in (ours, theirs)] for _ in range(args.rounds)]
            found = {
                f"{who}_{way}_ms": round(median(run[i][k] for run in runs), 2)
                for i, who in enumerate(("decoct", "torch"))
                for k, way in enumerate(("forward", "backward"))
            }
            date = datetime.now(UTC).isoformat("T", "seconds")
            line = {"shape": name, "dtype": str(dtype).removeprefix("torch."), **found, "threads": args.threads}
            line |= {
                "level": kernels.levels[-1] if kernels else "none",
                "capability": torch.backends.cpu.get_cpu_capability(),
            }
            line |= {"machine": machine(), "torch": torch.__version__, "date": date}
            with (HERE / "results" / "attention.jsonl").open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(line) + "\n")
            print(line, flush=True)


if __name__ == "__main__":
    main()

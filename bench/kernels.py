"""Microseconds of products of one token with a packed 2048 x 5632 matrix, beside torch's bf16 product and a plain read.

On one thread the processor's time is measured too: it says what a kernel takes where other work takes turns with it.

python bench/kernels.py --threads 1 >> bench/results/kernels.jsonl

--level avx2 measures an older processor's instructions on a newer one; ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 in the
environment bring torch to the same.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable

import torch

from decoct.native.library import library
from decoct.ops.float_grid import encode_packed, fit_float_grid
from decoct.ops.grid import Grid
from decoct.runtime.kernels import linear
from decoct.weights import Codebook, Dense, FloatBlock, GroupInt, Sparse, Ternary, Trellis, Weight
from decoct.weights.trellis import sequences_of

OUT, IN, GROUP = 2048, 5632, 64
ROUNDS = 5  # A B A B ...
COPIES = 64 << 20  # bytes of matrices that are multiplied in turn, so that none stays in the cache


def integers(bits: int, zeros: bool = False) -> GroupInt:
    groups = IN // GROUP
    scale = torch.rand(OUT, groups).add(0.5).mul(0.01).half()
    zero = torch.randint(2**bits, (OUT, groups), dtype=torch.uint8) if zeros else None
    codes = torch.randint(2**bits, (OUT, IN), dtype=torch.uint8)
    return GroupInt.of(codes, Grid(scale, zero, bits, GROUP), torch.bfloat16)


def float_block() -> FloatBlock:
    w = torch.randn(OUT, IN)
    grid = fit_float_grid(w, element="e2m1", scale_kind="e8m0", block_size=32)
    return FloatBlock.of_packed(encode_packed(w, grid), (OUT, IN), grid, torch.bfloat16)


def sparse(keep: float) -> Sparse:
    w = torch.randn(OUT, IN).bfloat16()
    return Sparse.of(w, torch.rand(OUT, IN) < keep)


def trellis(bits: int) -> Trellis:
    size = (IN // 16, *sequences_of(OUT * 16))
    digits = torch.randint(2**bits, size, dtype=torch.uint8)
    return Trellis.of(digits, (OUT, IN), torch.ones(1, 1).half(), torch.bfloat16, bits=bits, state_bits=10, stripe=16)


def weights() -> dict[str, Callable[[], Weight]]:
    ints = {f"int{bits} g{GROUP}": lambda bits=bits: integers(bits) for bits in (2, 3, 4, 5, 6, 8)}
    return {
        **ints,
        f"int4 g{GROUP} with zeros": lambda: integers(4, zeros=True),
        "mxfp4": float_block,
        "ternary": lambda: Ternary.of(
            torch.randint(-1, 2, (OUT, IN), dtype=torch.int8), torch.rand(OUT, 1).half(), IN, torch.bfloat16
        ),
        "codebook 4 bits, table a row": lambda: Codebook.of(
            torch.randint(16, (OUT, IN), dtype=torch.uint8), torch.randn(OUT, 16, 1).half(), torch.bfloat16
        ),
        "codebook 8 bits for 8": lambda: Codebook.of(
            torch.randint(256, (OUT, IN // 8), dtype=torch.uint8), torch.randn(1, 256, 8).half(), torch.bfloat16
        ),
        **{f"trellis {bits} bits": lambda bits=bits: trellis(bits) for bits in (2, 3, 4)},
        "bf16": lambda: Dense.of(torch.randn(OUT, IN).bfloat16()),
        "sparse 50 %": lambda: sparse(0.5),
        "sparse 80 %": lambda: sparse(0.2),
    }


def seconds(calls: list[Callable[[], object]], clock: Callable[[], float] = time.perf_counter) -> float:
    """Of one call, over all of them once."""
    start = clock()
    for call in calls:
        call()
    return (clock() - start) / len(calls)


def processor_seconds(calls: list[Callable[[], object]]) -> float:
    """The least of this thread's own time that one call took."""
    return min(seconds(calls, time.thread_time) for _ in range(ROUNDS))


def read_bandwidth() -> float:
    """GB/s of summing 64 MiB, on torch's threads."""
    block = torch.ones(COPIES // 8, dtype=torch.int64)
    return max(COPIES / seconds([block.sum]) / 1e9 for _ in range(5))


def several(weight: Weight, x: torch.Tensor) -> tuple[str, int, list[Callable[[], object]]]:
    """Products with copies of a weight, so many that the cache does not hold them."""
    count = max(2, COPIES // max(weight.nbytes, 1))
    products = [linear(weight.with_tensors({k: t.clone() for k, t in weight.tensors().items()})) for _ in range(count)]
    return products[0].describe(), products[0].nbytes, [lambda p=p: p(x) for p in products]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--level", help="no newer instructions than these, e.g. avx2")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    x = torch.randn(1, IN).bfloat16()
    dense = [torch.randn(OUT, IN).bfloat16() for _ in range(3)]
    base = [lambda w=w: torch.nn.functional.linear(x, w) for w in dense]
    found = library()
    if args.level and found:
        found.levels = found.levels[: found.levels.index(args.level) + 1]
    about = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "level": found.levels[-1] if found else "none",
        "torch": torch.backends.cpu.get_cpu_capability(),
    }
    for name, make in weights().items():
        kernel, nbytes, calls = several(make(), x)
        seconds(calls), seconds(base)
        ours, theirs, speeds, loads = [], [], [], []
        for _ in range(ROUNDS):
            ours.append(seconds(calls))
            theirs.append(seconds(base))
            speeds.append(read_bandwidth())
            loads.append(os.getloadavg()[0])
        micro, reference, speed = (statistics.median(each) for each in (ours, theirs, speeds))
        line = {
            **about,
            "matrix": name,
            "kernel": kernel,
            "bytes": nbytes,
            "microseconds": round(micro * 1e6, 1),
            "best_microseconds": round(min(ours) * 1e6, 1),
            "bf16_microseconds": round(reference * 1e6, 1),
            "best_bf16_microseconds": round(min(theirs) * 1e6, 1),
            "gigabytes_per_second": round(nbytes / micro / 1e9, 2),
            "read_gigabytes_per_second": round(speed, 2),
            "best_read_gigabytes_per_second": round(max(speeds), 2),
            "load_average": round(max(loads), 1),
        }
        if torch.get_num_threads() == 1:
            line["processor_microseconds"] = round(processor_seconds(calls) * 1e6, 1)
            line["bf16_processor_microseconds"] = round(processor_seconds(base) * 1e6, 1)
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()

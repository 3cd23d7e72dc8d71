"""GPTQ on the testbed, decoct against llm-compressor: same tokens, same bits, A B A B, medians and ratios.

usage: speed.py --model TESTBED --calibration c4.utf8 --peer-python VENV/bin/python --work DIR [--rounds 2]
The peer runs bench/peers/llmcompressor_gptq.py in its own environment. Seconds are of the compression alone, imports and
model loading left out on both sides; peak memory is the whole process's.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--peer-python", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--record", type=Path, default=HERE / "results" / "speed.jsonl")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    recipe = args.work / "gptq.yaml"
    method = {"gptq": {"bits": args.bits, "group_size": 64}}
    recipe.write_text(json.dumps({
        "data": {"source": str(args.calibration), "num_sequences": args.sequences, "sequence_length": 512},
        "stages": [{"blocks": [{"linear": method}]}],
    }))  # fmt: skip
    ours, theirs = [], []
    for round_ in range(args.rounds):
        ours.append(run_decoct(args, recipe))
        print("decoct", ours[-1], flush=True)
        theirs.append(run_peer(args, round_))
        print("llm-compressor", theirs[-1], flush=True)
    median = {name: statistics.median(run["seconds"] for run in runs) for name, runs in (("a", ours), ("b", theirs))}
    result = {
        "method": f"gptq {args.bits} bit group 64", "calibration": f"{args.sequences}x512", "decoct": ours,
        "llmcompressor": theirs, "ratio_seconds": median["a"] / median["b"],
        "ratio_peak": max(r["peak_bytes"] for r in ours) / max(r["peak_bytes"] for r in theirs),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    args.record.parent.mkdir(exist_ok=True)
    with args.record.open("a", encoding="utf-8") as handle:
        handle.write(json.dumps(result) + "\n")
    print(json.dumps(result, indent=2))


def run_decoct(args: argparse.Namespace, recipe: Path) -> dict[str, Any]:
    out = args.work / "decoct"
    code = "from decoct.cli import main; main()"
    command = [sys.executable, "-c", code, "--threads", "2", "compress", str(args.model), str(recipe), "-o", str(out),
               "--fresh", "--json"]  # fmt: skip
    made = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return {"seconds": made["seconds"], "peak_bytes": made["peak_bytes"]}


def run_peer(args: argparse.Namespace, round_: int) -> dict[str, Any]:
    out = args.work / f"peer-{args.bits}bit-{round_}"
    shutil.rmtree(out, ignore_errors=True)
    command = [str(args.peer_python), str(HERE / "peers" / "llmcompressor_gptq.py"), str(args.model), str(out),
               "--method", "gptq", "--bits", str(args.bits), "--group-size", "64", "--calibration", str(args.calibration),
               "--sequences", str(args.sequences), "--length", "512", "--threads", "2"]  # fmt: skip
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    made = json.loads((out / "result.json").read_text())
    return {"seconds": made["seconds"], "peak_bytes": made["peak_rss_bytes"], "version": made["version"]}


if __name__ == "__main__":
    main()

"""Peak memory and throughput of one compression, in a process of its own, beside the disk's own speed.

usage: memory.py MODEL RECIPE.yaml OUT --memory 3GiB [--record results/memory.jsonl --name NAME]
The copy of the model's shards (dd, flushed to disk) before and after gives the disk's speed; drop the page cache first if
you can (echo 3 > /proc/sys/vm/drop_caches) and name the run accordingly.
"""

import argparse
import json
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--memory", required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--record", type=Path, default=Path(__file__).parent / "results" / "memory.jsonl")
    args = parser.parse_args()
    size = sum(path.stat().st_size for path in args.model.glob("*.safetensors"))
    before = read_speed(args.model)
    code = "from decoct.cli import main; main()"
    command = [sys.executable, "-c", code, "--threads", "2", "compress", str(args.model), str(args.recipe),
               "-o", str(args.out), "--memory", args.memory, "--json"]  # fmt: skip
    started = time.perf_counter()
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    seconds = time.perf_counter() - started
    made = json.loads(done.stdout)
    result = {
        "name": args.name, "memory_limit": args.memory, "peak_bytes": made["peak_bytes"], "seconds_whole": round(seconds, 1),
        "seconds_run": round(made["seconds"], 1), "source_bytes": size, "result_bytes": made["nbytes"],
        "source_mb_per_second": round(size / seconds / 1e6), "disk_read_mb_per_second": [before, read_speed(args.model)],
        "bits_per_weight": made["bits_per_weight"], "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    args.record.parent.mkdir(exist_ok=True)
    with args.record.open("a", encoding="utf-8") as handle:
        handle.write(json.dumps(result) + "\n")
    print(json.dumps(result, indent=2))


def read_speed(model: Path) -> int:
    """MB a second of reading up to 4 GB of shards with plain reads."""
    started, total = time.perf_counter(), 0
    for path in sorted(model.glob("*.safetensors")):
        with path.open("rb", buffering=0) as handle:
            while chunk := handle.read(1 << 24):
                total += len(chunk)
        if total > 4e9:
            break
    return round(total / (time.perf_counter() - started) / 1e6)


if __name__ == "__main__":
    main()

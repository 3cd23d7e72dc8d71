"""Kill a compression with -9 at random moments, run it again, and compare the result bit by bit; N times.

usage: resume.py MODEL CALIBRATION WORK [--kills 20] [--preset w4] [--set KEY=VALUE ...]
One uninterrupted run gives the reference. Then each trial starts afresh, is killed once at a moment drawn uniformly over
the reference's duration, and the same command is run to its end.
"""

import argparse
import hashlib
import json
import random
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--preset", default="w4")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--record", type=Path, default=Path(__file__).parent / "results" / "resume.jsonl")
    args = parser.parse_args()
    settings = [word for setting in args.set for word in ("--set", setting)]
    command = [sys.executable, "-c", "from decoct.cli import main; main()", "--threads", "2", "compress", str(args.model),
               "--preset", args.preset, "--data", str(args.calibration), *settings, "-o"]  # fmt: skip
    reference = args.work / "reference"
    shutil.rmtree(args.work, ignore_errors=True)
    started = time.perf_counter()
    subprocess.run([*command, str(reference)], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    duration = time.perf_counter() - started
    wanted = digests(reference)
    chance = random.Random(0)  # noqa: S311 - moments to kill at, not secrets
    outcomes = []
    for trial in range(args.kills):
        out = args.work / f"trial-{trial}"
        moment = chance.uniform(0.2, 0.98) * duration
        process = subprocess.Popen([*command, str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(moment)
        process.kill()
        process.wait()
        journals = sorted((out / ".run").glob("stage-*/journal.jsonl"))
        parts = sum(max(0, len(path.read_text().splitlines()) - 1) for path in journals)
        finished = (out / "config.json").exists() and not (out / ".run").exists()
        if not finished:
            subprocess.run([*command, str(out)], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        outcomes.append(
            {"moment": round(moment, 1), "parts_done": parts, "finished": finished, "same": digests(out) == wanted}
        )
        print(outcomes[-1], flush=True)
        shutil.rmtree(out)
    result = {
        "model": args.model.name, "preset": args.preset, "settings": args.set, "kills": args.kills,
        "identical": sum(outcome["same"] for outcome in outcomes), "uninterrupted_seconds": round(duration, 1),
        "outcomes": outcomes, "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    args.record.parent.mkdir(exist_ok=True)
    with args.record.open("a", encoding="utf-8") as handle:
        handle.write(json.dumps(result) + "\n")
    print(f"{result['identical']} of {args.kills} identical")


def digests(folder: Path) -> dict[str, str]:
    """Every file of a result but the run's times."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != "decoct-run.json")
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


if __name__ == "__main__":
    main()

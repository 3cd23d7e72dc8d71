"""Quality of the first four methods on the testbed: perplexity, KL, top-1, bits per weight, seconds, peak memory.

Resumable: every finished row is a line of bench/results/spine.jsonl and is not measured again. Each compression and
each evaluation is a process of its own, so that peak memory is that row's alone.

usage: spine.py --model TESTBED --calibration c4.utf8 --text wiki.test.raw [--work DIR] [--rows NAME ...]
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "spine.jsonl"
STANDARD = {"sequences": 128, "length": 512, "windows": 20, "window": 1024}
QUICK = {"sequences": 32, "length": 512, "windows": 8, "window": 1024}

GROUPS = {"group_size": 64, "symmetric": True}
ROWS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "gptq 4 bit": ("standard", [{"gptq": {"bits": 4, **GROUPS}}]),
    "rtn 4 bit": ("standard", [{"rtn": {"bits": 4, **GROUPS}}]),
    "gptq 3 bit": ("standard", [{"gptq": {"bits": 3, **GROUPS}}]),
    "rtn 3 bit": ("standard", [{"rtn": {"bits": 3, **GROUPS}}]),
    "wanda 50 %": ("standard", [{"wanda": {"sparsity": 0.5}}]),
    "svd_llm keep 0.8": ("standard", [{"svd_llm": {"keep": 0.8}}]),
    "gptq 4 bit, quick": ("quick", [{"gptq": {"bits": 4, **GROUPS}}]),
    "gptq 4 bit, min-max scales": ("quick", [{"gptq": {"bits": 4, "clip_search": False, **GROUPS}}]),
    "gptq 3 bit, then eora rank 16": ("quick", [{"gptq": {"bits": 3, **GROUPS}}, {"eora": {"rank": 16}}]),
    "wanda 50 %, then gptq 4 bit": ("quick", [{"wanda": {"sparsity": 0.5}}, {"gptq": {"bits": 4, **GROUPS}}]),
    "svd_llm keep 0.8, then rtn 8 bit": (
        "quick",
        [{"svd_llm": {"keep": 0.8}}, {"rtn": {"bits": 8, "group_size": "channel"}}],
    ),
    "rtn 8 bit, embedding too": ("quick", [{"match": ["embed", "*"], "rtn": {"bits": 8, **GROUPS}}]),
}


def main() -> None:
    """Fill the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=os.environ.get("DECOCT_TESTBED"), help="the testbed folder")
    parser.add_argument("--calibration", type=Path, default=os.environ.get("DECOCT_CALIBRATION"))
    parser.add_argument("--text", type=Path, default=os.environ.get("DECOCT_TEXT"))
    parser.add_argument("--work", type=Path, default=HERE.parent / ".bench")
    parser.add_argument("--rows", nargs="*", default=list(ROWS))
    args = parser.parse_args()
    if None in (args.model, args.calibration, args.text):
        parser.error("give --model, --calibration and --text (bench/README.md says where they come from)")
    RESULTS.parent.mkdir(exist_ok=True)
    done = {json.loads(line)["row"] for line in RESULTS.read_text().splitlines()} if RESULTS.exists() else set()
    for row in args.rows:
        if row not in done:
            measured = measure(row, args)
            with RESULTS.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(measured) + "\n")
            print(row, {k: measured[k] for k in ("perplexity", "kl_mean", "top1_agreement", "seconds")}, flush=True)


def measure(row: str, args: argparse.Namespace) -> dict[str, Any]:
    """Compress, evaluate, one line."""
    name, steps = ROWS[row]
    protocol = STANDARD if name == "standard" else QUICK
    out = args.work / row.replace(" ", "-").replace("%", "pct").replace(",", "")
    recipe = {
        "data": {
            "source": str(args.calibration), "num_sequences": protocol["sequences"], "sequence_length": protocol["length"],
        },
        "stages": [{"blocks": [{"linear": step} for step in steps]}],
    }  # fmt: skip
    args.work.mkdir(parents=True, exist_ok=True)
    file = out.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(recipe))
    made = decoct(
        "--threads", "2", "compress", args.model, file, "-o", out, *([] if (out / ".run").exists() else ["--fresh"])
    )
    found = decoct(
        "--threads", "2", "evaluate", out, "--against", args.model, "--text", args.text,
        "--windows", protocol["windows"], "--length", protocol["window"],
    )  # fmt: skip
    shutil.rmtree(out)
    keys = (
        "perplexity",
        "base_perplexity",
        "kl_mean",
        "kl_p99",
        "kl_p999",
        "top1_agreement",
        "nbytes",
        "bits_per_weight",
    )
    figures = {key: found[key] for key in keys}
    return {
        "row": row, "protocol": name, "calibration": f"{protocol['sequences']}x{protocol['length']} {args.calibration.name}",
        "evaluation": found["protocol"], **figures, "seconds": made["seconds"], "peak_bytes": made["peak_bytes"],
        "date": found["date"], "decoct": found["decoct"],
    }  # fmt: skip


def decoct(*arguments: object) -> dict[str, Any]:
    """Run a command with --json and give its answer."""
    command = [sys.executable, "-c", "from decoct.cli import main; main()", *map(str, arguments), "--json"]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, arguments))} failed: {done.stdout}")
    return dict(json.loads(done.stdout))


if __name__ == "__main__":
    main()

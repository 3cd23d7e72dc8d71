"""Other tools on the testbed, on the same tokens: quality beside ours, and seconds in turn (A B A B).

usage: compare.py quality --tool NAME=VENV/bin/python ... [--rows NAME ...]    fills results/peers.jsonl, resumable
       compare.py speed   --tool NAME=VENV/bin/python ... [--rows NAME ...]    fills results/speed.jsonl, resumable
Both need --model TESTBED --calibration c4.utf8 --text wiki.test.raw; every tool runs in an environment of its own.
Seconds are of the compression alone: imports and model loading are left out on both sides; peak memory is the whole process's.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from quantization import awq, grid, steps
from rows import HERE, KEYS, PROTOCOLS, Stages, decoct, linear, write_tables

TOOLS = {
    "llm-compressor": "peer_llmcompressor.py", "llm-compressor-pruning": "peer_llmcompressor_pruning.py", "auto-round": "peer_autoround.py", "hqq": "peer_hqq.py",
    "gptqmodel": "peer_gptqmodel.py",
}  # fmt: skip
BITS_BESIDE = {"hqq": 32 / 64}  # scale and zero point in 16 bits each, per group of 64; the others have a scale alone
PATTERNS: dict[str, dict[str, Any]] = {
    "50 %": {"sparsity": 0.5}, "60 %": {"sparsity": 0.6}, "70 %": {"sparsity": 0.7}, "2:4": {"n": 2, "m": 4},
}  # fmt: skip
# Tool, method, bits (or which weights go); our recipe with the same method.
ROWS: dict[str, tuple[str, str, int | str, Stages]] = {}
for b in (4, 3, 2):
    ROWS |= {
        f"auto-round {b} bit": ("auto-round", "autoround", b, steps({"autoround": grid(b)})),
        f"llm-compressor awq {b} bit": ("llm-compressor", "awq", b, awq(b)),
        f"llm-compressor gptq {b} bit": ("llm-compressor", "gptq", b, linear({"gptq": grid(b)})),
        f"hqq {b} bit": ("hqq", "hqq", b, linear({"hqq": {"bits": b, "group_size": 64}})),
        f"gptqmodel gptq {b} bit": ("gptqmodel", "gptq", b, linear({"gptq": grid(b)})),
    }
for name, settings in PATTERNS.items():
    for method in ("wanda", "sparsegpt"):
        ours = linear({method: {**settings, **({"scope": "row"} if method == "wanda" and "n" not in settings else {})}})
        ROWS[f"llm-compressor {method} {name}"] = ("llm-compressor-pruning", method, name, ours)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("quality", "speed", "page"))
    parser.add_argument("--tool", action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--work", type=Path, default=HERE.parent / ".bench")
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--protocol", choices=list(PROTOCOLS), default="standard")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if args.what == "page":
        measured = list(lines(HERE / "results" / "peers.jsonl"))
        for page, pruning in (("quantization.md", False), ("pruning.md", True)):
            mine = [row for row in measured if ("pruning" in row["peer"]["tool"]) == pruning]
            tables = {"peers": [row for row in mine if row["protocol"] == "standard"]}
            tables["peers, quick"] = [row for row in mine if row["protocol"] == "quick"]
            write_tables(HERE / page, {name: side_by_side(rows) for name, rows in tables.items() if rows})
        return
    args.work.mkdir(parents=True, exist_ok=True)
    args.python = dict(each.split("=", 1) for each in args.tool)
    results = HERE / "results" / ("peers.jsonl" if args.what == "quality" else "speed.jsonl")
    done = {(each.get("row"), each.get("protocol")) for each in lines(results)}
    for row in args.rows:
        if ROWS[row][0] in args.python and (row, args.protocol) not in done:
            found = quality(row, args) if args.what == "quality" else speed(row, args)
            record = {
                "row": row,
                "protocol": args.protocol,
                "threads": args.threads,
                **found,
                "date": datetime.now(UTC).isoformat("T", "seconds"),
            }
            with results.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(record) + "\n")
            print(json.dumps(record), flush=True)


def lines(results: Path) -> Iterator[dict[str, Any]]:
    """What is measured so far."""
    if results.exists():
        yield from (json.loads(line) for line in results.read_text().splitlines())


def quality(row: str, args: argparse.Namespace) -> dict[str, Any]:
    """Ours, then the tool's, both evaluated with decoct. Each is kept should the other fail, or be measured again."""

    def once(side: str, run: Callable[[str, argparse.Namespace], dict[str, Any]], folder: Path) -> dict[str, Any]:
        kept = args.work / f"{row} {args.protocol} {side}.json".replace("/", "-")
        if not kept.exists():
            kept.write_text(json.dumps(run(row, args) | figures(folder, args)), encoding="utf-8")
        return dict(json.loads(kept.read_text()))

    ours = once("decoct", our_run, args.work / "ours")
    peer = once("peer", theirs, args.work / "peer" / "dense")
    # The tool's result was folded into a dense folder: its bits follow from its format.
    return {
        "decoct": ours,
        "peer": {key: value for key, value in peer.items() if key not in ("nbytes", "bits_per_weight")},
    }


def figures(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Perplexity, KL, top-1."""
    protocol = PROTOCOLS[args.protocol]
    found = decoct(
        "--threads", args.threads, "evaluate", folder, "--against", args.model, "--text", args.text,
        "--windows", protocol["windows"], "--length", protocol["window"], "--keep-base", args.work / "base",
    )  # fmt: skip
    return {key: found[key] for key in KEYS}


def speed(row: str, args: argparse.Namespace) -> dict[str, Any]:
    """In turn, medians."""
    ours, peers = [], []
    for _ in range(args.rounds):
        ours.append(our_run(row, args))
        peers.append(theirs(row, args))
        print(row, ours[-1], peers[-1]["seconds"], flush=True)
    median = [statistics.median(run["seconds"] for run in runs) for runs in (ours, peers)]
    peak = [max(run["peak_bytes"] for run in runs) for runs in (ours, peers)]
    return {
        "decoct": ours, "peer": [{key: run[key] for key in ("seconds", "peak_bytes", "version")} for run in peers],
        "times_faster": median[1] / median[0], "ratio_peak": peak[0] / peak[1],
    }  # fmt: skip


def theirs(row: str, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds, memory, bits."""
    (tool, method, level, _), protocol, out = ROWS[row], PROTOCOLS[args.protocol], args.work / "peer"
    shutil.rmtree(out, ignore_errors=True)
    wanted = ["--bits", level, "--group-size", 64] if isinstance(level, int) else ["--pattern", level]
    command = [
        args.python[tool], HERE / "peers" / TOOLS[tool], args.model, out, "--method", method, *wanted, "--calibration",
        args.calibration, "--sequences", protocol["sequences"], "--length", protocol["length"], "--threads", args.threads,
    ]  # fmt: skip
    # Not our search path: the tool would take modules of this folder for packages of the same name.
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    parts = [str(part) for part in command]
    subprocess.run(parts, check=True, env=clean, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    made = json.loads((out / "result.json").read_text())
    bits = {"bits_in_matrices": level + BITS_BESIDE.get(tool, 16 / 64)} if isinstance(level, int) else {}
    return {
        "seconds": made["seconds"], "peak_bytes": made["peak_rss_bytes"], "tool": tool, "version": made["version"],
        **bits, "settings": made["settings"],
    }  # fmt: skip


def our_run(row: str, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds and memory."""
    protocol, recipe = PROTOCOLS[args.protocol], args.work / "ours.yaml"
    args.work.mkdir(parents=True, exist_ok=True)
    data = {
        "source": str(args.calibration), "num_sequences": protocol["sequences"], "sequence_length": protocol["length"],
    }  # fmt: skip
    recipe.write_text(yaml.safe_dump({"data": data, "stages": ROWS[row][3]}))
    made = decoct("--threads", args.threads, "compress", args.model, recipe, "-o", args.work / "ours", "--fresh")
    return {key: made[key] for key in ("seconds", "peak_bytes", "decoct") if key in made}


def side_by_side(measured: Iterable[dict[str, Any]]) -> str:
    """Markdown."""
    head = "| | perplexity | mean KL | top-1 | seconds | peak memory |\n" + "|---" * 6 + "|"
    rows = [
        f"| {row['row']}{'*' * (row.get('threads') == 1)}: {who} | {each['perplexity']:.2f} | {each['kl_mean']:.4f} | {100 * each['top1_agreement']:.1f} % "
        f"| {'' if each['seconds'] is None else format(each['seconds'], '.0f')} | {each['peak_bytes'] / 2**20:.0f} MiB |"
        for row in measured
        for who, each in ((f"{row['peer']['tool']} {row['peer']['version']}", row["peer"]), ("decoct", row["decoct"]))
    ]
    return "\n".join([head, *rows])


if __name__ == "__main__":
    main()

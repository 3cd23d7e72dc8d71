"""Tables of recipes on a testbed: perplexity, KL, top-1, bits per weight, seconds, peak memory; one JSON line a row.

Resumable: a row that stands in the results file is not measured again. Each compression and each evaluation is a
process of its own, so that peak memory is that row's alone.
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
PROTOCOLS = {
    "standard": {"sequences": 128, "length": 512, "windows": 20, "window": 1024},
    "quick": {"sequences": 32, "length": 512, "windows": 8, "window": 1024},
}
KEYS = ("perplexity", "base_perplexity", "kl_mean", "kl_p99", "kl_p999", "top1_agreement", "nbytes", "bits_per_weight")
CACHE_KEYS = ("cache_bits", "cache_token_bytes")  # of rows with a policy for keys and values

Stages = list[dict[str, Any]]
Search = dict[str, Any]
Rows = Mapping[str, tuple[str, Stages] | tuple[str, Stages, Search]]
"""By the row's name: protocol, stages and, where bits or sparsities are searched, the target."""


def fill(
    rows: Rows,
    results: Path,
    about: str | None,
    page: Path | None = None,
    kind: Callable[[dict[str, Any]], str] = lambda _: "",
    order: Callable[[dict[str, Any]], Any] = lambda _: 0,
) -> None:
    """Measure what the results file lacks; arguments from the command line.

    Args:
        rows: what there is to measure.
        results: one line of JSON a row.
        about: of the script.
        page: has a place for each table, see `write_tables`; None: `--page` prints one table.
        kind: into which table a measured row belongs.
        order: by which rows of a table are sorted.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=os.environ.get("DECOCT_TESTBED"), help="the testbed folder")
    parser.add_argument("--calibration", type=Path, default=os.environ.get("DECOCT_CALIBRATION"))
    parser.add_argument("--text", type=Path, default=os.environ.get("DECOCT_TEXT"))
    parser.add_argument("--work", type=Path, default=HERE.parent / ".bench")
    parser.add_argument("--rows", nargs="*", default=list(rows), help="only these")
    parser.add_argument("--threads", type=int, default=2, help="of each process; 1 where two lanes share two cores")
    parser.add_argument("--page", action="store_true", help="write what is measured so far into the page, and stop")
    args = parser.parse_args()
    if args.page:
        measured = sorted((json.loads(line) for line in results.read_text().splitlines()), key=order)
        tables = {name: table([row for row in measured if kind(row) == name]) for name in map(kind, measured)}
        if page is None:
            print(*tables.values(), sep="\n")
        else:
            write_tables(page, tables)
        return
    if None in (args.model, args.calibration, args.text):
        parser.error("give --model, --calibration and --text (bench/README.md says where they come from)")
    unknown = [row for row in args.rows if row not in rows]
    if unknown:
        parser.error(f"no row {unknown[0]!r}; there are {', '.join(rows)}")
    results.parent.mkdir(exist_ok=True)
    done = {json.loads(line)["row"] for line in results.read_text().splitlines()} if results.exists() else set()
    for row in args.rows:
        if row not in done:
            measured = measure(row, args, *rows[row])
            with results.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(measured) + "\n")
            print(row, {k: measured[k] for k in ("perplexity", "kl_mean", "top1_agreement", "seconds")}, flush=True)


def measure(
    row: str, args: argparse.Namespace, protocol_name: str, stages: Stages, search: Search | None = None
) -> dict[str, Any]:
    """Compress, evaluate, one line."""
    protocol = PROTOCOLS[protocol_name]
    out = args.work / re.sub(r"[^a-z0-9.]+", "-", row.lower().replace("%", "pct"))
    recipe = {
        "data": {
            "source": str(args.calibration), "num_sequences": protocol["sequences"], "sequence_length": protocol["length"],
        },
        "stages": stages, "search": search,
    }  # fmt: skip
    args.work.mkdir(parents=True, exist_ok=True)
    file = out.parent / f"{out.name}.yaml"
    file.write_text(yaml.safe_dump(recipe))
    fresh = [] if (out / ".run").exists() else ["--fresh"]
    made = decoct("--threads", args.threads, "compress", args.model, file, "-o", out, *fresh)
    found = decoct(
        "--threads", args.threads, "evaluate", out, "--against", args.model, "--text", args.text,
        "--windows", protocol["windows"], "--length", protocol["window"], "--keep-base", args.work / "base",
    )  # fmt: skip
    shutil.rmtree(out)
    return {
        "row": row, "protocol": protocol_name,
        "calibration": f"{protocol['sequences']}x{protocol['length']} {args.calibration.name}",
        "evaluation": found["protocol"], **{key: found[key] for key in KEYS},
        **{key: found[key] for key in CACHE_KEYS if found[key] is not None},
        "seconds": made["seconds"], "peak_bytes": made["peak_bytes"], "threads": args.threads, "machine": machine(),
        "date": found["date"], "decoct": found["decoct"],
    }  # fmt: skip


def machine() -> str:
    """The processor's name, family and model, where Linux tells."""
    cpu = Path("/proc/cpuinfo")
    if not cpu.exists():
        return platform.processor()
    told = dict(line.split(":", 1) for line in cpu.read_text().split("\n\n")[0].splitlines())
    told = {key.strip(): value.strip() for key, value in told.items()}
    return f"{told.get('model name', platform.machine())}, family {told.get('cpu family')}, model {told.get('model')}"


def parameters(row: dict[str, Any]) -> float:
    """Millions of them, with what a plain matrix of the same shape would hold."""
    return round(row["nbytes"] * 8 / row["bits_per_weight"] / 1e6, 1)


def table(measured: list[dict[str, Any]]) -> str:
    """Markdown; with bits and bytes of a token where rows are about cached values, with sizes where shapes differ."""
    caches = all("cache_bits" in row for row in measured)
    shapes = len({parameters(row) for row in measured}) > 1
    if caches:
        size = "bits a cached value | bytes a token"
    else:
        size = "parameters | MiB | bits per weight" if shapes else "bits per weight"
    head = f"| | perplexity | mean KL | KL 99 % | top-1 | {size} | seconds | peak memory |"

    def size_of(row: dict[str, Any]) -> str:
        if caches:
            return f"{row['cache_bits']:.2f} | {row['cache_token_bytes']:.0f}"
        bits = f"{row['bits_per_weight']:.2f}"
        return f"{parameters(row):.1f} M | {row['nbytes'] / 2**20:.0f} | {bits}" if shapes else bits

    lines = [
        f"| {row['row']} | {row['perplexity']:.2f} | {row['kl_mean']:.4f} | {row['kl_p99']:.2f} "
        f"| {100 * row['top1_agreement']:.1f} % | {size_of(row)} | {row['seconds']:.0f}{'*' * (row.get('threads') == 1)}"
        f"{'' if 'machine' in row else '°'} | {row['peak_bytes'] / 2**20:.0f} MiB |"
        for row in measured
    ]
    return "\n".join([head, "|---" * head.count(" | ") + "|---|", *lines])


def write_tables(page: Path, tables: Mapping[str, str]) -> None:
    """Replace what stands in a page between `<!-- NAME -->` and `<!-- end -->` by each table."""
    text = page.read_text(encoding="utf-8")
    for name, lines in tables.items():
        pattern = rf"(?s)(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)"
        if not re.search(pattern, text):
            raise SystemExit(f"{page} has no place for the table {name}: <!-- {name} --> and <!-- end -->")
        text = re.sub(pattern, lambda found, lines=lines: f"{found[1]}{lines}\n{found[2]}", text)
    page.write_text(text, encoding="utf-8")


def decoct(*arguments: object) -> dict[str, Any]:
    """Run a command with --json and give its answer."""
    command = [sys.executable, "-c", "from decoct.cli import main; main()", *map(str, arguments), "--json"]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, arguments))} failed: {done.stdout}")
    return dict(json.loads(done.stdout))


def linear(*steps: dict[str, Any]) -> Stages:
    """One streamed pass of these linear steps."""
    return [{"blocks": [{"linear": step} for step in steps]}]

"""Speed and memory of the runtime: decoct's decode loop beside llama.cpp and bfloat16 in eager transformers, in turn.

    python bench/runtime.py --set random --scratch /tmp/runtime --calibration c4.txt
    python bench/runtime.py --set testbed --model smollm2 --scratch /tmp/runtime --calibration c4.txt
    python bench/runtime.py --page

Set `random` is a Llama of 1.1B parameters with random weights (`make_random.py`), `testbed` the model given, `small` a tiny
shape to try the script with. Each row is measured by `decoct.serving.bench.in_turn`: every engine in a process of its
own, rounds in turn, medians. A row that stands in results/runtime.jsonl for the same set and threads is not measured
again, and compressed models stay in the scratch folder: interrupted, the same command goes on.

The row "4 bit" also runs decoct-int8, and other engines with what `decoct export` wrote of it: `--also openvino=FOLDER`.

A row of llama.cpp runs what `decoct export BASE --to gguf:q4_0` writes, or a file given as `--gguf`.
"""

import argparse
import json
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rows import HERE, write_tables

import decoct
from decoct.serving.bench import BASELINE, Speed, in_turn, measure_bandwidth

RESULTS, PAGE = HERE / "results" / "runtime.jsonl", HERE / "runtime.md"
ENDS = {"match": ["embed", "lm_head"], "rtn": {"bits": 8, "group_size": 64}}

ROWS: dict[str, list[dict[str, Any]]] = {
    "4 bit": [ENDS, {"match": "*", "rtn": {"bits": 4, "group_size": 64}}],
    "3 bit": [ENDS, {"match": "*", "rtn": {"bits": 3, "group_size": 64}}],
    "2 bit": [ENDS, {"match": "*", "rtn": {"bits": 2, "group_size": 64}}],
    "70 % sparse": [{"match": "*", "magnitude": {"sparsity": 0.7}}],
    "low rank, keep 0.5": [{"match": "*", "svd_llm": {"keep": 0.5}}],
}
"""By the row's name: the rules that compress the matrices."""

SMALL = {"num_hidden_layers": 2, "hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 4}
LENGTHS = {"random": (512, 64), "testbed": (512, 64), "small": (16, 4)}  # tokens of prompt and answer in a round
ROUNDS = {"random": 5, "testbed": 5, "small": 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=LENGTHS)
    parser.add_argument("--model", type=Path, help="the testbed (for small: whose tokenizer is taken)")
    parser.add_argument("--scratch", type=Path, help="folder for compressed models")
    parser.add_argument("--calibration", type=Path, help="text for what needs one; rows that lack it are left out")
    parser.add_argument("--gguf", type=Path, help="the base in Q4_0, if decoct is not to write it")
    parser.add_argument("--also", nargs="*", default=[], metavar="ENGINE=FOLDER")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=list(ROWS), choices=list(ROWS), metavar="ROW")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", action="store_true", help="write the tables of runtime.md and stop")
    args = parser.parse_args()
    if args.page:
        write_page(args.results)
        return
    if args.set is None or args.scratch is None:
        parser.error("give --set and --scratch")
    torch.set_num_threads(args.threads)
    args.scratch.mkdir(parents=True, exist_ok=True)
    base = find_base(args)
    gguf = args.gguf or written_gguf(base, args.scratch / f"{args.set}-q4_0.gguf")
    for row in args.only:
        if done(args.results, row, args):
            continue
        folder = compressed(base, row, args)
        if folder is not None:
            measure(row, base, folder, gguf, args)


def done(results: Path, row: str, args: argparse.Namespace) -> bool:
    """Whether this row was measured already."""
    lines = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    return (row, args.set, args.threads) in {(each["row"], each["set"], each["threads"]) for each in lines}


def find_base(args: argparse.Namespace) -> Path:
    """The uncompressed checkpoint, made if it has to be."""
    if args.set == "testbed":
        if args.model is None:
            sys.exit("give --model: the testbed (bench/README.md says where it comes from)")
        return args.model
    base = args.scratch / f"{args.set}-base"
    if (base / "config.json").exists():
        return base
    if args.set == "random":
        more = ["--tokenizer", str(args.model)] if args.model else []
        subprocess.run([sys.executable, HERE / "make_random.py", base, "--shape", "tinyllama-1.1b", *more], check=True)
    else:
        from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(**SMALL, num_key_value_heads=2, vocab_size=512, max_position_embeddings=1024)
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(base)
        if args.model:
            AutoTokenizer.from_pretrained(args.model).save_pretrained(base)
    return base


def written_gguf(base: Path, out: Path) -> Path | None:
    """The base in llama.cpp's Q4_0; None where decoct cannot write it."""
    if not out.exists():
        command = "from decoct.cli import main; main()"
        asked = [sys.executable, "-c", command, "export", str(base), "--to", "gguf:q4_0", "-o", str(out), "--fold"]
        made = subprocess.run(asked, capture_output=True, text=True, check=False)
        if made.returncode:
            print(f"no llama.cpp: {made.stderr.strip().splitlines()[-1]}", file=sys.stderr)
            return None
    return out


def compressed(base: Path, row: str, args: argparse.Namespace) -> Path | None:
    """The base compressed as the row says; goes on where an earlier run was cut off."""
    recipe: dict[str, Any] = {"stages": [{"blocks": [{"linear": ROWS[row]}]}]}
    if decoct.plan(base, recipe).needs_data:
        if args.calibration is None:
            print(f"{row} is left out: give --calibration", file=sys.stderr)
            return None
        length = 16 if args.set == "small" else 512
        recipe["data"] = {"source": str(args.calibration), "num_sequences": 8, "sequence_length": length}
    out = args.scratch / f"{args.set}-{row.replace(' ', '-').replace(',', '')}"
    return decoct.compress(base, recipe, out).folder


def measure(row: str, base: Path, folder: Path, gguf: Path | None, args: argparse.Namespace) -> None:
    """One line of results."""
    prompt, answer = LENGTHS[args.set]
    several = [("decoct", str(folder)), (BASELINE, str(base))]
    several += [("llama.cpp", str(gguf))] if gguf else []
    if row == "4 bit":
        several += [("decoct-int8", str(folder)), *(tuple(each.split("=", 1)) for each in args.also)]
    speeds = in_turn(several, prompt_tokens=prompt, decode_tokens=answer, rounds=ROUNDS[args.set])
    bandwidth = measure_bandwidth()
    inspected = decoct.inspect(folder)
    ours = speeds[0]
    line = {
        "row": row,
        "set": args.set,
        "threads": args.threads,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": platform.processor() or platform.machine(),
        "prompt_tokens": prompt,
        "decode_tokens": answer,
        "file_nbytes": inspected.nbytes,
        "bits_per_weight": inspected.bits_per_weight,
        "bandwidth": bandwidth,
        "bandwidth_share": ours.weight_nbytes * ours.decode_tokens_per_second / bandwidth,
        "memory_over_file": (ours.peak_memory_bytes - ours.loaded_memory_bytes) / inspected.nbytes,
        "engines": {speed.engine: as_json(speed) for speed in speeds},
    }
    args.results.parent.mkdir(parents=True, exist_ok=True)
    with args.results.open("a", encoding="utf-8") as handle:
        handle.write(json.dumps(line) + "\n")
    print(json.dumps(line))


def as_json(speed: Speed) -> dict[str, float | str]:
    """What a line keeps of an engine."""
    return {
        "about": speed.about,
        "decode": speed.decode_tokens_per_second,
        "prefill": speed.prefill_tokens_per_second,
        "first_token": speed.time_to_first_token,
        "peak_memory": speed.peak_memory_bytes,
        "rounds": speed.rounds,
    }


def write_page(results: Path) -> None:
    """Fill the tables of runtime.md, one for each set; the latest line of a row counts."""
    lines = {}
    for text in results.read_text().splitlines() if results.exists() else []:
        line = json.loads(text)
        lines[line["set"], line["row"], line["threads"]] = line
    tables = {name: table([each for key, each in lines.items() if key[0] == name]) for name in ("random", "testbed")}
    for (name, row, _), line in lines.items():
        if row == "4 bit":
            tables[f"{name}, engines"] = side_by_side(line)
    write_tables(PAGE, {name: found for name, found in tables.items() if found})


def side_by_side(line: dict[str, Any]) -> str:
    """Every engine of a row."""
    found = [
        "| engine | decode, tokens/s | prefill, tokens/s | first token, s | peak memory, MiB |",
        "|---|---|---|---|---|",
    ]
    found += [
        f"| {name} | {each['decode']:.1f} | {each['prefill']:.0f} | {each['first_token']:.2f} | {each['peak_memory'] / 2**20:.0f} |"
        for name, each in line["engines"].items()
    ]
    return "\n".join(found)


def table(lines: list[dict[str, Any]]) -> str:
    """A Markdown table; "" without lines."""
    if not lines:
        return ""
    head = "| row | threads | bits per weight | decode, tokens/s | x eager bf16 | x llama.cpp Q4_0 | of the bandwidth | prefill, tokens/s | memory over file |"
    found = [head, "|" + "---|" * head.count("|", 1)]
    for line in lines:
        engines = line["engines"]
        ours = engines["decoct"]
        beside = [
            f"{ours['decode'] / engines[name]['decode']:.2f}" if name in engines else ""
            for name in (BASELINE, "llama.cpp")
        ]
        cells = [
            line["row"], line["threads"], f"{line['bits_per_weight']:.2f}", f"{ours['decode']:.1f}", *beside,
            f"{100 * line['bandwidth_share']:.0f} %", f"{ours['prefill']:.0f}", f"{line['memory_over_file']:.2f}",
        ]  # fmt: skip
        found.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(found)


if __name__ == "__main__":
    main()

"""GGUF files in llama.cpp: decoct's own integers beside llama.cpp's rounding with an importance matrix, type by type.

usage: gguf_files.py --model TESTBED --calibration c4.txt --text wiki.test.raw [--work DIR] [--rows NAME ...] | --page

For each row decoct compresses the model and writes a file; a second file has the same types tensor by tensor, but what
is in them was rounded by ggml from the uncompressed model, with an importance matrix of the same calibration tokens.
llama.cpp runs both, and the uncompressed file, on the windows of the standard protocol. A row that stands in
results/gguf.jsonl is not measured again.
"""

import argparse
import json
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
import yaml
from llama_cpp import loaded, quantized
from quantization import grid, steps
from rows import HERE, PROTOCOLS, Stages, decoct, linear, machine, write_tables
from transformers import AutoModelForCausalLM, AutoTokenizer

import decoct as decoct_package

RESULTS, PAGE = HERE / "results" / "gguf.jsonl", HERE / "gguf.md"
PROTOCOL = PROTOCOLS["standard"]


def grid32(bits: int, **more: Any) -> dict[str, Any]:
    """Groups of 32, as ggml's blocks have."""
    return {**grid(bits), "group_size": 32, **more}


ROWS: dict[str, tuple[str, Stages]] = {
    "q4_0, gptq": ("q4_0", linear({"gptq": grid32(4)})),
    "q4_0, autoround": ("q4_0", steps({"autoround": grid32(4)})),
    "q4_1, gptq": ("q4_1", linear({"gptq": grid32(4, symmetric=False)})),
    "q5_0, gptq": ("q5_0", linear({"gptq": grid32(5)})),
    "q8_0, rtn": ("q8_0", linear({"rtn": grid32(8)})),
}
"""By name: the type asked for, and how decoct gets there."""

INPUTS = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--work", type=Path, default=HERE.parent / ".bench")
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--page", action="store_true", help="write the table of gguf.md and stop")
    args = parser.parse_args()
    done = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    if args.page:
        write_tables(PAGE, {"files": table(done)})
        return
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    base = args.work / "base-f32.gguf"
    if not base.exists():
        decoct("export", args.model, "--to", "gguf:f32", "-o", base, "--no-load")
    for row in args.rows:
        if row not in {each["row"] for each in done}:
            line = measure(row, base, args)
            with RESULTS.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)


def measure(row: str, base: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Both files, in llama.cpp; and ours in decoct."""
    kind, stages = ROWS[row]
    name = row.replace(", ", "-")
    folder, ours, theirs = args.work / name, args.work / f"{name}.gguf", args.work / f"{name}-ggml.gguf"
    recipe = args.work / f"{name}.yaml"
    data = {
        "source": str(args.calibration), "num_sequences": PROTOCOL["sequences"], "sequence_length": PROTOCOL["length"],
    }  # fmt: skip
    recipe.write_text(yaml.safe_dump({"data": data, "stages": stages}))
    made = decoct("--threads", args.threads, "compress", args.model, recipe, "-o", folder)
    own = decoct(
        "--threads", args.threads, "evaluate", folder, "--against", args.model, "--text", args.text, "--windows",
        PROTOCOL["windows"], "--length", PROTOCOL["window"], "--keep-base", args.work / "base",
    )  # fmt: skip
    ours.unlink(missing_ok=True)
    decoct("export", folder, "--to", f"gguf:{kind}", "-o", ours, "--no-load")
    write_theirs(ours, base, theirs, importance(args))
    figures = {who: in_llama_cpp(path, base, args) for who, path in (("decoct", ours), ("ggml", theirs))}
    types = {t.tensor_type.name for t in gguf.GGUFReader(ours).tensors} - {"F32"}
    shutil.rmtree(folder)
    theirs.unlink()
    return {
        "row": row, "types": sorted(types), "file_bytes": ours.stat().st_size, "threads": args.threads, **figures,
        "in_decoct": {key: own[key] for key in ("perplexity", "kl_mean", "base_perplexity")},
        "seconds": made["seconds"], "machine": machine(), "decoct_version": decoct_package.__version__,
        "date": datetime.now(UTC).isoformat("T", "seconds"),
    }  # fmt: skip


def write_theirs(ours: Path, base: Path, theirs: Path, weights: dict[str, npt.NDArray[np.float32]]) -> None:
    """A copy of our file whose tensors are the uncompressed model's, rounded by ggml to the types that ours has."""
    shutil.copy(ours, theirs)
    exact = {tensor.name: tensor.data for tensor in gguf.GGUFReader(base).tensors}
    with theirs.open("r+b") as handle:
        for tensor in gguf.GGUFReader(ours).tensors:
            values = exact[tensor.name]
            if tensor.tensor_type == gguf.GGMLQuantizationType.F32:
                rounded = values.tobytes()
            else:
                weight = weights.get(tensor.name)
                rounded = quantized(values, int(tensor.tensor_type), int(tensor.n_bytes), weight).tobytes()
            handle.seek(tensor.data_offset)
            handle.write(rounded)


def importance(args: argparse.Namespace) -> dict[str, npt.NDArray[np.float32]]:
    """Mean squares of what each matrix reads, by GGUF's names; kept for the next row."""
    kept = args.work / "importance.npz"
    if not kept.exists():
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
        sums: dict[str, torch.Tensor] = {}

        def take(name: str, x: torch.Tensor) -> None:
            sums[name] = sums.get(name, torch.zeros(())) + x.double().square().sum((0, 1))

        for block in range(model.config.num_hidden_layers):
            for theirs, path in INPUTS.items():
                module = model.get_submodule(f"model.layers.{block}.{path}")
                name = f"blk.{block}.{theirs}.weight"
                module.register_forward_pre_hook(lambda _, given, name=name: take(name, given[0]))
        count, length = PROTOCOL["sequences"], PROTOCOL["length"]
        tokens = token_ids(args.model, args.calibration)[: count * length].reshape(count, length)
        with torch.no_grad():
            for rows in torch.from_numpy(tokens).long().split(8):
                model.model(rows)
        np.savez(kept, **{name: (each / tokens.size).float().numpy() for name, each in sums.items()})
    return dict(np.load(kept))


def token_ids(model: Path, text: Path) -> npt.NDArray[np.int32]:
    """A text's tokens, as a whole, without special ones."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    return np.asarray(tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False).input_ids, np.int32)


def in_llama_cpp(path: Path, base: Path, args: argparse.Namespace) -> dict[str, float]:
    """Perplexity, and KL divergence from the uncompressed file, both run by llama.cpp."""
    count, length = PROTOCOL["windows"], PROTOCOL["window"]
    windows = token_ids(args.model, args.text)[: count * length].reshape(count, length)
    loss, base_loss, divergence = 0.0, 0.0, 0.0
    with (
        loaded(base, context=length, threads=args.threads) as exact,
        loaded(path, context=length, threads=args.threads) as network,
    ):
        for window in windows:
            p, q = (torch.from_numpy(each.logits(window)[:-1]).log_softmax(-1) for each in (exact, network))
            answers = torch.from_numpy(window[1:]).long().unsqueeze(1)
            base_loss -= p.gather(1, answers).double().sum().item()
            loss -= q.gather(1, answers).double().sum().item()
            divergence += (p.exp() * (p - q)).double().sum().item()
    tokens = count * (length - 1)
    return {
        "perplexity": float(np.exp(loss / tokens)), "base_perplexity": float(np.exp(base_loss / tokens)),
        "kl_mean": divergence / tokens,
    }  # fmt: skip


def table(measured: list[dict[str, Any]]) -> str:
    """Markdown."""
    head = "| types | decoct by | file | perplexity in decoct | in llama.cpp | KL in llama.cpp | llama.cpp's own rounding: perplexity | KL |"
    found = [head, "|" + "---|" * head.count("|", 1)]
    for row in measured:
        kind, method = row["row"].split(", ")
        ours, theirs = row["decoct"], row["ggml"]
        found.append(
            f"| {kind} ({', '.join(row['types'])}) | {method} | {row['file_bytes'] / 2**20:.0f} MiB | {row['in_decoct']['perplexity']:.2f} "
            f"| {ours['perplexity']:.2f} | {ours['kl_mean']:.4f} | {theirs['perplexity']:.2f} | {theirs['kl_mean']:.4f} |"
        )
    return "\n".join(found)


if __name__ == "__main__":
    main()

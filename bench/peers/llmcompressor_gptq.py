#!/usr/bin/env python3
r"""Quantize a causal language model with llm-compressor, timed, for comparison.

The peer tool runs with its own defaults: only the weight scheme (symmetric
integers, one scale per group of input columns, every Linear but lm_head) and
the calibration tokens are set here. OUT_DIR receives

  dense/       an ordinary bf16 Hugging Face folder whose Linear weights are the
               quantized-dequantized ones, so that any evaluator can read it
  result.json  tool, version, settings, wall seconds and peak memory

The same JSON goes to stdout; the tool's own messages go to stderr. "seconds" is
the oneshot() call alone. "peak_rss_bytes" is the peak of the whole process up to
the end of that call, which includes imports, the model and the tokenizer, and
excludes the export of dense/. With --method rtn the tool needs no calibration
data and chooses its data-free pipeline; the tokens are prepared but not used.

Needs its own environment: pip install torch llmcompressor

usage:
  python bench/peers/llmcompressor_gptq.py MODEL_DIR OUT_DIR --calibration TEXT_FILE
  python bench/peers/llmcompressor_gptq.py MODEL_DIR OUT_DIR --calibration TEXT_FILE \
      --method rtn --bits 4 --group-size 64 --threads 2
"""

import argparse
import contextlib
import importlib.metadata
import json
import resource
import sys
import time
from pathlib import Path

import torch
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationScheme,
    fake_quantize,
)
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

with contextlib.redirect_stdout(sys.stderr):  # the tool's logger keeps the stdout that it sees when imported
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.pipelines import CalibrationPipeline

MODIFIERS = {"gptq": GPTQModifier, "rtn": QuantizationModifier}
TARGETS = ["Linear"]
IGNORE = ["lm_head"]


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir", type=Path, metavar="MODEL_DIR")
    parser.add_argument("out_dir", type=Path, metavar="OUT_DIR")
    parser.add_argument("--method", choices=sorted(MODIFIERS), default="gptq")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument(
        "--calibration",
        type=Path,
        required=True,
        metavar="FILE",
        help="UTF-8 text; its first sequences * length tokens are used",
    )
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=512, help="tokens per sequence")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args(argv)


def calibration_dataset(tokenizer, path, sequences, length):
    """The first sequences * length tokens of the file, one row per sequence."""
    text = path.read_text(encoding="utf-8")
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    wanted = sequences * length
    if len(ids) < wanted:
        raise SystemExit(f"{path}: {len(ids)} tokens, {wanted} needed")
    rows = torch.tensor(ids[:wanted]).reshape(sequences, length)
    return Dataset.from_dict(
        {
            "input_ids": rows.tolist(),
            "attention_mask": torch.ones_like(rows).tolist(),
        }
    )


def make_modifier(method, bits, group_size):
    weights = QuantizationArgs(
        num_bits=bits,
        type="int",
        symmetric=True,
        strategy="group",
        group_size=group_size,
    )
    scheme = QuantizationScheme(targets=TARGETS, weights=weights)
    return MODIFIERS[method](config_groups={"group_0": scheme}, ignore=IGNORE)


def load_model(model_dir):
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)


def peak_rss_bytes():
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def quantized_linears(model):
    for name, module in model.named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is not None and scheme.weights is not None:
            yield name, module, scheme.weights


def dense_weight(name, module, args):
    """The weight that the tool's own forward pass computes with, as bf16.

    Raises RuntimeError unless every element is an integer of the wanted width
    times its group's stored scale.
    """
    scale = module.weight_scale
    dense = fake_quantize(module.weight.data, scale, getattr(module, "weight_zero_point", None), args).to(
        torch.bfloat16
    )

    groups = dense.float().unflatten(-1, (-1, args.group_size))
    step = scale.float().unsqueeze(-1)
    codes = (groups / step).round()
    half = 2 ** (args.num_bits - 1)
    in_range = codes.min() >= -half and codes.max() <= half - 1
    on_grid = torch.equal((codes * step).to(torch.bfloat16), groups.to(torch.bfloat16))
    if not (in_range and on_grid):
        raise RuntimeError(f"{name}: the weight is not on its quantization grid")
    return dense


@torch.no_grad()
def save_dense(quantized, model_dir, tokenizer, out_dir):
    """Put the quantized values into a plain copy of the model, and save that."""
    plain = load_model(model_dir)
    for name, module, args in quantized_linears(quantized):
        plain.get_submodule(name).weight.copy_(dense_weight(name, module, args))
    plain.save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)


def effective_settings(model, modifier, threads):
    """What was in force, including the defaults that the tool filled in."""
    linears = list(quantized_linears(model))
    settings = {
        "targets": TARGETS,
        "ignore": IGNORE,
        "quantized_linears": len(linears),
        "pipeline": type(CalibrationPipeline.from_modifiers([modifier])).__name__,
        "weights": linears[0][2].model_dump(mode="json"),
        "scale_dtype": str(linears[0][1].weight_scale.dtype).removeprefix("torch."),
        "batch_size": 1,
        "model_dtype": "bfloat16",
        "device": str(model.device),
        "threads": threads,
    }
    if isinstance(modifier, GPTQModifier):
        settings["block_size"] = modifier.block_size
        settings["dampening_frac"] = modifier.dampening_frac
    for package in ("compressed-tensors", "torch", "transformers"):
        settings[package] = importlib.metadata.version(package)
    return settings


def run(args):
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)  # the tool visits the sequences in random order
    tokenizer = AutoTokenizer.from_pretrained(args.model_dir)
    dataset = calibration_dataset(tokenizer, args.calibration, args.sequences, args.length)
    model = load_model(args.model_dir)
    modifier = make_modifier(args.method, args.bits, args.group_size)

    start = time.perf_counter()
    model = oneshot(
        model=model,
        tokenizer=tokenizer,
        recipe=modifier,
        dataset=dataset,
        num_calibration_samples=args.sequences,
    )
    seconds = time.perf_counter() - start
    peak = peak_rss_bytes()

    result = {
        "tool": "llm-compressor",
        "version": importlib.metadata.version("llmcompressor"),
        "method": args.method,
        "bits": args.bits,
        "group_size": args.group_size,
        "sequences": args.sequences,
        "length": args.length,
        "seconds": round(seconds, 3),
        "peak_rss_bytes": peak,
        "settings": effective_settings(model, modifier, args.threads),
    }
    args.out_dir.mkdir(parents=True, exist_ok=True)
    save_dense(model, args.model_dir, tokenizer, args.out_dir / "dense")
    return result


def main(argv=None):
    args = parse_args(argv)
    with contextlib.redirect_stdout(sys.stderr):
        result = run(args)
    text = json.dumps(result, indent=2)
    (args.out_dir / "result.json").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()

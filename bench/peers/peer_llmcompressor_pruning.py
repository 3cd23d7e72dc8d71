"""Prune with llm-compressor: wanda or sparsegpt. Needs its own environment: pip install torch llmcompressor.

The tool runs with its defaults; only how many weights go, which layers (every Linear but lm_head) and the calibration
tokens are set here.

usage: python bench/peers/peer_llmcompressor_pruning.py MODEL_DIR OUT_DIR --calibration FILE [--pattern "50 %"]
"""

import contextlib
import sys

import torch
from common import Timer, arguments, calibration_tokens, load_model, main, report, save_dense
from datasets import Dataset
from transformers import AutoTokenizer

with contextlib.redirect_stdout(sys.stderr):  # the tool's logger keeps the stdout that it sees when imported
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier


def modifier(method, pattern):
    """For "60 %" or "2:4"."""
    if ":" in pattern:
        n, m = map(int, pattern.split(":"))
        wanted = {"sparsity": 1 - n / m, "mask_structure": pattern}
    else:
        wanted = {"sparsity": int(pattern.split()[0]) / 100}
    kind = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}[method]
    return kind(targets=["Linear"], ignore=["re:.*lm_head"], **wanted)


@torch.no_grad()
def run():
    args = arguments(__doc__, ["wanda", "sparsegpt"])
    tokens = calibration_tokens(args)
    rows = {"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()}
    model = load_model(args.model_dir)
    with Timer() as timer:
        model = oneshot(
            model=model,
            tokenizer=AutoTokenizer.from_pretrained(args.model_dir),
            recipe=modifier(args.method, args.pattern),
            dataset=Dataset.from_dict(rows),
            num_calibration_samples=args.sequences,
        )
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name
    }
    values = {f"{name}.weight": module.weight.data for name, module in linears.items()}
    zeros = sum(int((value == 0).sum()) for value in values.values()) / sum(v.numel() for v in values.values())
    save_dense(args, values)
    settings = {"pruned_linears": len(linears), "zeros": round(zeros, 4)}
    return report(args, "llm-compressor-pruning", "llmcompressor", timer, settings)


if __name__ == "__main__":
    main(run)

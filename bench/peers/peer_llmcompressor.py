"""Quantize with llm-compressor: rtn, gptq or awq. Needs its own environment: pip install torch llmcompressor.

The tool runs with its defaults; only the scheme (symmetric integers, one scale per group of input columns, every Linear
but lm_head) and the calibration tokens are set here. With --method rtn it needs no data and chooses its data-free
pipeline; the tokens are prepared but not used.

usage: python bench/peers/peer_llmcompressor.py MODEL_DIR OUT_DIR --calibration FILE [--method gptq --bits 4]
"""

import contextlib
import sys

import torch
from common import Timer, arguments, calibration_tokens, load_model, main, report, save_dense
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, fake_quantize
from datasets import Dataset
from transformers import AutoTokenizer

with contextlib.redirect_stdout(sys.stderr):  # the tool's logger keeps the stdout that it sees when imported
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache

# AWQ pins its cache for copies to an accelerator, which fails where there is none (0.14.0).
IntermediatesCache.pin_memory = lambda *_: None


def modifiers(method, bits, group_size):
    weights = QuantizationArgs(num_bits=bits, type="int", symmetric=True, strategy="group", group_size=group_size)
    scheme = {
        "config_groups": {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}, "ignore": ["lm_head"],
    }  # fmt: skip
    if method == "gptq":
        return [GPTQModifier(**scheme)]
    return [*([AWQModifier(offload_device=None)] if method == "awq" else []), QuantizationModifier(**scheme)]


def dense_weight(name, module):
    """The weight that the tool's own forward pass computes with, as bf16.

    Raises RuntimeError unless every element is an integer of the wanted width times its group's stored scale.
    """
    args, scale = module.quantization_scheme.weights, module.weight_scale
    zero = getattr(module, "weight_zero_point", None)
    dense = fake_quantize(module.weight.data, scale, zero, args).to(torch.bfloat16)
    groups = dense.float().unflatten(-1, (-1, args.group_size))
    step = scale.float().unsqueeze(-1)
    codes, half = (groups / step).round(), 2 ** (args.num_bits - 1)
    in_range = codes.min() >= -half and codes.max() <= half - 1
    if not (in_range and torch.equal((codes * step).to(torch.bfloat16), groups.to(torch.bfloat16))):
        raise RuntimeError(f"{name}: the weight is not on its quantization grid")
    return dense


@torch.no_grad()
def run():
    args = arguments(__doc__, ["gptq", "rtn", "awq"])
    tokens = calibration_tokens(args)
    rows = {"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()}
    model, recipe = load_model(args.model_dir), modifiers(args.method, args.bits, args.group_size)
    with Timer() as timer, torch.enable_grad():
        model = oneshot(
            model=model,
            tokenizer=AutoTokenizer.from_pretrained(args.model_dir),
            recipe=recipe,
            dataset=Dataset.from_dict(rows),
            num_calibration_samples=args.sequences,
        )
    values = {name: value for name, value in model.named_parameters() if name.endswith("norm.weight")}  # AWQ folds into
    linears = {
        name: module
        for name, module in model.named_modules()
        if getattr(getattr(module, "quantization_scheme", None), "weights", None) is not None
    }
    values |= {f"{name}.weight": dense_weight(name, module) for name, module in linears.items()}
    save_dense(args, values)
    settings = {"quantized_linears": len(linears), "batch_size": 1}
    if args.method == "gptq":
        settings |= {"block_size": recipe[0].block_size, "dampening_frac": recipe[0].dampening_frac}
    return report(args, "llm-compressor", "llmcompressor", timer, settings)


if __name__ == "__main__":
    main(run)

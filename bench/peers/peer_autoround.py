"""Quantize with auto-round. Needs its own environment: pip install torch auto-round.

usage: python bench/peers/peer_autoround.py MODEL_DIR OUT_DIR --calibration FILE [--bits 4 --iterations 50]
"""

import torch
from auto_round import AutoRound
from common import Timer, arguments, calibration_tokens, load_model, main, report, save_dense
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

ITERATIONS = 50


def run():
    args = arguments(__doc__, ["autoround"])
    rows = calibration_tokens(args)
    batches = DataLoader([{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows], batch_size=8)
    model, tokenizer = load_model(args.model_dir), AutoTokenizer.from_pretrained(args.model_dir)
    tool = AutoRound(
        model, tokenizer, bits=args.bits, group_size=args.group_size, sym=True, iters=ITERATIONS,
        nsamples=args.sequences, seqlen=args.length, dataset=batches, device_map="cpu",
    )  # fmt: skip
    with Timer() as timer:
        model, _ = tool.quantize()
    linears = {
        f"{name}.weight": module.weight.data
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    save_dense(args, linears)
    return report(
        args, "auto-round", "auto-round", timer, {"iterations": ITERATIONS, "quantized_linears": len(linears)}
    )


if __name__ == "__main__":
    main(run)

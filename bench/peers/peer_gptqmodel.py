"""GPTQ with gptqmodel. Needs its own environment: pip install torch; pip install --no-build-isolation gptqmodel.

usage: python bench/peers/peer_gptqmodel.py MODEL_DIR OUT_DIR --calibration FILE [--bits 4 --group-size 64]
"""

import os

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # 7.6.0 does not start on two cores with its default of one

import torch
from common import Timer, arguments, calibration_tokens, main, report, save_dense
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig


def run():
    args = arguments(__doc__, ["gptq"])
    rows = [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in calibration_tokens(args)]
    config = QuantizeConfig(bits=args.bits, group_size=args.group_size, sym=True, device="cpu")
    model = GPTQModel.load(str(args.model_dir), config)
    with Timer() as timer:
        model.quantize(rows, batch_size=1, backend=BACKEND.TORCH)
    model.save(str(args.out_dir / "packed"))
    packed = GPTQModel.load(str(args.out_dir / "packed"), device="cpu", backend=BACKEND.TORCH)
    layers = {name: module for name, module in packed.model.named_modules() if hasattr(module, "dequantize_weight")}
    save_dense(args, {f"{name}.weight": module.dequantize_weight().T for name, module in layers.items()})
    return report(
        args, "gptqmodel", "gptqmodel", timer, {"quantized_linears": len(layers), "desc_act": config.desc_act}
    )


if __name__ == "__main__":
    main(run)

"""Quantize with the hqq package (needs no data). Needs its own environment: pip install torch hqq.

usage: python bench/peers/peer_hqq.py MODEL_DIR OUT_DIR --calibration FILE [--bits 4 --group-size 64]
"""

import torch
from common import Timer, arguments, load_model, main, report, save_dense
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from hqq.models.hf.base import AutoHQQHFModel


def run():
    args = arguments(__doc__, ["hqq"])
    model = load_model(args.model_dir)
    config = BaseQuantizeConfig(nbits=args.bits, group_size=args.group_size, axis=1)
    with Timer() as timer:
        AutoHQQHFModel.quantize_model(model, quant_config=config, compute_dtype=torch.bfloat16, device="cpu")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, HQQLinear)}
    save_dense(args, {f"{name}.weight": module.dequantize() for name, module in layers.items()})
    return report(args, "hqq", "hqq", timer, {"axis": 1, "quantized_linears": len(layers)})


if __name__ == "__main__":
    main(run)

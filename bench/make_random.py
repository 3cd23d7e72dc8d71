"""Write a random Llama checkpoint of a given shape, shard by shard, so that it may be larger than memory.

usage: make_random.py OUT --shape llama-3-8b|tinyllama-1.1b [--tokenizer FOLDER]
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

SHAPES = {
    "llama-3-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 500000.0,
    },
    "tinyllama-1.1b": {
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
        "num_key_value_heads": 4, "vocab_size": 32000, "rope_theta": 10000.0,
    },
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument(
        "--tokenizer", type=Path, help="folder to take tokenizer files from; its vocabulary must be smaller"
    )
    args = parser.parse_args()
    shape = SHAPES[args.shape]
    args.out.mkdir(parents=True)
    hidden, mid, layers = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    kv = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    total = layers + 2
    weight_map: dict[str, str] = {}

    def save(number: int, shapes: dict[str, tuple[int, ...]]) -> None:
        name = f"model-{number:05d}-of-{total:05d}.safetensors"
        tensors = {}
        for key, dims in shapes.items():
            values = torch.empty(dims, dtype=torch.bfloat16)
            tensors[key] = values.fill_(1.0) if len(dims) == 1 else values.normal_(0.0, 0.02)
        save_file(tensors, args.out / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))

    save(1, {"model.embed_tokens.weight": (shape["vocab_size"], hidden)})
    for i in range(layers):
        p = f"model.layers.{i}."
        save(i + 2, {
            f"{p}self_attn.q_proj.weight": (hidden, hidden), f"{p}self_attn.k_proj.weight": (kv, hidden),
            f"{p}self_attn.v_proj.weight": (kv, hidden), f"{p}self_attn.o_proj.weight": (hidden, hidden),
            f"{p}mlp.gate_proj.weight": (mid, hidden), f"{p}mlp.up_proj.weight": (mid, hidden),
            f"{p}mlp.down_proj.weight": (hidden, mid), f"{p}input_layernorm.weight": (hidden,),
            f"{p}post_attention_layernorm.weight": (hidden,),
        })  # fmt: skip
    save(total, {"model.norm.weight": (hidden,), "lm_head.weight": (shape["vocab_size"], hidden)})
    index = {"metadata": {}, "weight_map": weight_map}
    (args.out / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "rms_norm_eps": 1e-5,
        "max_position_embeddings": 2048, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, **shape,
    }  # fmt: skip
    (args.out / "config.json").write_text(json.dumps(config))
    for file in args.tokenizer.glob("tokenizer*") if args.tokenizer else ():
        shutil.copy(file, args.out)


if __name__ == "__main__":
    main()

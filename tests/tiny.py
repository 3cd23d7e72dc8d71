"""Tiny random models of every family, saved as checkpoints."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

COMMON = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": COMMON,
    "llama-tied": {**COMMON, "tie_word_embeddings": True},
    "mistral": {**COMMON, "sliding_window": 8},
    "qwen2": COMMON,
    "qwen3": COMMON,
    "gemma2": {**COMMON, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": {**COMMON, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "phi3": COMMON,
    "olmo2": COMMON,
    "gpt2": {"vocab_size": 96, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "bos_token_id": 1},
    "opt": {**COMMON, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt_neox": COMMON,
    "mixtral": {**COMMON, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {**COMMON, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
}


def make_model(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random model of a family, weights large enough that every layer matters."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name.split("-", 1)[0], **{**CONFIGS[name], **changes})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.15)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(dtype)


def save_model(name: str, folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Save such a model; gives the model itself."""
    model = make_model(name, dtype, **changes)
    model.save_pretrained(folder)
    return model

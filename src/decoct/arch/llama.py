"""Llama and what shares its block: Mistral, Qwen2, Qwen3, OLMo-2 (norms after), Gemma 2 and 3, Phi-3 (fused)."""

from decoct.arch.parts import (
    attention,
    gated_mlp,
    llama_like,
    post_norm_stream,
    pre_norm_stream,
    pre_norms,
)
from decoct.arch.schema import Config, Family, Norm, Slot


def _post_norm(_: Config) -> tuple[Slot, ...]:
    """OLMo-2 normalises after each sublayer: queries and MLP read the residual stream itself."""
    return attention(reads="attn_resid") + gated_mlp(reads="mlp_resid")


def _phi3(_: Config) -> tuple[Slot, ...]:
    """Query, key and value in one matrix; gate and up in another."""
    return (
        Slot("self_attn.qkv_proj.weight", "attn.qkv", "attn_in", "qkv"),
        Slot("self_attn.o_proj.weight", "attn.o", "attn_mid", "resid"),
        Slot("mlp.gate_up_proj.weight", "mlp.gate_up", "mlp_in", "mlp_mid"),
        Slot("mlp.down_proj.weight", "mlp.down", "mlp_mid", "resid"),
    )


def _gemma_norms(_: Config) -> tuple[Norm, ...]:
    return (
        Norm("input_layernorm.weight", "attn_in", offset=1.0),
        Norm("pre_feedforward_layernorm.weight", "mlp_in", offset=1.0),
    )


LLAMA = Family("llama", ("llama",), llama_like, pre_norms, pre_norm_stream)
MISTRAL = Family("mistral", ("mistral", "ministral"), llama_like, pre_norms, pre_norm_stream)
QWEN2 = Family("qwen2", ("qwen2",), llama_like, pre_norms, pre_norm_stream)
QWEN3 = Family("qwen3", ("qwen3",), llama_like, pre_norms, pre_norm_stream)
GEMMA2 = Family("gemma2", ("gemma2",), llama_like, _gemma_norms, post_norm_stream)
GEMMA3 = Family("gemma3", ("gemma3_text",), llama_like, _gemma_norms, post_norm_stream)
OLMO2 = Family("olmo2", ("olmo2",), _post_norm, stream=post_norm_stream)
PHI3 = Family("phi3", ("phi3",), _phi3, pre_norms, pre_norm_stream)

"""What the blocks of a llama-like family compute beside their matrices: norms, scales, caps, in plain numbers."""

from dataclasses import dataclass
from typing import Any

from decoct.arch import Config
from decoct.arch.hf import all_settings
from decoct.model import Model

FAST = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")
"""Families that the decode loop knows; the others run through transformers."""

_GEMMA = ("gemma2", "gemma3")
_CHANGING = ("dynamic", "longrope")  # kinds of rotary embedding whose angles depend on how long a text is


@dataclass(frozen=True, slots=True)
class Anatomy:
    """A family's arithmetic, for one config.

    Attributes:
        heads: of the queries.
        kv_heads: of keys and values.
        head_size: channels of a head.
        eps: added to a norm's mean square.
        gain_offset: a norm's gain is this plus its weight: 1 for Gemma, which also multiplies before it rounds.
        scale: of the attention scores.
        score_cap: scores are squashed below this; None: not.
        logit_cap: logits are squashed below this; None: not.
        activation: "silu", "gelu" or "gelu_tanh".
        embed_scale: factor on what the embedding gives; None: none.
    """

    heads: int
    kv_heads: int
    head_size: int
    eps: float
    gain_offset: float
    scale: float
    score_cap: float | None
    logit_cap: float | None
    activation: str
    embed_scale: float | None


_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}


def slow_because(model: Model) -> str | None:
    """Why the decode loop cannot run a model; None: it can."""
    name = model.family.name
    if name not in FAST:
        return f"the family {name} is not in decoct's decode loop"
    settings = all_settings(model.config)
    rope = settings.get("rope_parameters") or {}
    kinds = {each.get("rope_type") for each in (rope, *rope.values()) if isinstance(each, dict)}
    if kinds & set(_CHANGING):
        return "its rotary embedding depends on how long the text is"
    if _activation(settings) not in _ACTIVATIONS:
        return f"its activation {_activation(settings)} is not in decoct's decode loop"
    if settings.get("use_bidirectional_attention"):
        return "its attention looks ahead"
    return None


def anatomy(model: Model) -> Anatomy:
    """A model's arithmetic; `slow_because` has said that there is one."""
    settings = all_settings(model.config)
    gemma = model.family.name in _GEMMA
    head_size = model.family.head_size(settings)
    scalar = settings["query_pre_attn_scalar"] if gemma else head_size
    return Anatomy(
        heads=int(settings["num_attention_heads"]),
        kv_heads=int(settings.get("num_key_value_heads") or settings["num_attention_heads"]),
        head_size=head_size,
        eps=float(settings["rms_norm_eps"]),
        gain_offset=1.0 if gemma else 0.0,
        scale=float(scalar) ** -0.5,
        score_cap=settings["attn_logit_softcapping"] if model.family.name == "gemma2" else None,
        logit_cap=settings.get("final_logit_softcapping"),
        activation=_ACTIVATIONS[_activation(settings)],
        embed_scale=float(settings["hidden_size"]) ** 0.5 if gemma else None,
    )


def _activation(settings: Config | dict[str, Any]) -> str:
    return str(settings.get("hidden_activation") or settings.get("hidden_act"))

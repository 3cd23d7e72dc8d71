"""Attention of whole sequences by decoct's compiled kernels, in the seat of transformers' own.

On CPUs most of a small model's pass is torch's attention; the kernels take a third of its time and less.
"""

from typing import Any

import torch
from torch import Tensor, nn

from decoct.native import attend
from decoct.native.library import library

NAME = "decoct"
"""As transformers calls it."""


def use_compiled_attention(model: Any) -> None:
    """Let a model of transformers use it wherever it would use torch's; nothing changes without the kernels."""
    if library() is None or model.config._attn_implementation != "sdpa":  # noqa: SLF001 - no public name for it
        return
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """[batch, tokens, heads, channels] of queries [batch, heads, tokens, channels], as transformers asks for it.

    Masks and dropout are left to torch.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    plain = (
        attention_mask is None
        and settings.get("is_causal") is not False
        and module.is_causal
        and not settings.get("dropout")
        and settings.get("position_bias") is None
        and query.shape[2] == key.shape[2] > 1
    )
    if plain:
        scale = query.shape[3] ** -0.5 if scaling is None else scaling
        found = attend(*_autocast(query, key, value), scale=scale)
        if found is not None:
            return found, None
    theirs: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, **settings
    )
    return theirs


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """In the dtype in which autocast would have torch attend: rotated queries and keys come out of it in float32."""
    if not torch.is_autocast_enabled("cpu") or any(each.dtype == torch.float64 for each in tensors):
        return tensors
    return tuple(each.to(torch.get_autocast_dtype("cpu")) for each in tensors)

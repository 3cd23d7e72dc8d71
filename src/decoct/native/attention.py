"""Attention of a prompt's tokens by the compiled kernels."""

import torch
from jaxtyping import Float
from torch import Tensor

from decoct.native.library import FLOATS, LEVELS, TYPES, Attention, Heads, library


def attend_prompt(
    queries: Float[Tensor, "tokens heads channels"],
    keys: Float[Tensor, "kv_heads seen channels"],
    values: Float[Tensor, "kv_heads seen channels"],
    *,
    scale: float,
    score_cap: float | None,
    window: int | None,
) -> Float[Tensor, "tokens heads channels"] | None:
    """Causal attention of a sequence's newest tokens, in float32; only what a softmax gives is rounded, as torch does.

    Args:
        queries: of any float dtype, as are the others.
        keys: of all tokens seen, those of the queries last.
        values: the same.
        scale: of scores.
        score_cap: scores are squashed to less than this; None: not at all.
        window: tokens that one sees, itself among them; None: all.

    Returns:
        What was found, or None where the kernels cannot read the tensors as they lie.
    """
    kernels = library()
    tokens, heads, channels = queries.shape
    if kernels is None or not _readable(queries, keys, values):
        return None
    out = torch.empty(tokens, heads, channels, dtype=queries.dtype)
    kernels.attend(
        Attention(
            type=TYPES[queries.dtype], heads=heads, kv_heads=keys.shape[0], head_size=channels, tokens=tokens,
            seen=keys.shape[1], window=window or 0, scale=scale, score_cap=score_cap or 0.0,
            queries=_heads(queries.transpose(0, 1)), keys=_heads(keys), values=_heads(values), out=out.data_ptr(),
        ),
        LEVELS.index(kernels.levels[-1]),
    )  # fmt: skip
    return out


def _readable(*tensors: Tensor) -> bool:
    """Whether the kernels know the dtype, and channels lie one after the other."""
    dtype = tensors[0].dtype
    return dtype in FLOATS and all(
        each.dtype == dtype and each.device.type == "cpu" and each.stride(2) == 1 for each in tensors
    )


def _heads(tensor: Float[Tensor, "heads tokens channels"]) -> Heads:
    return Heads(tensor.data_ptr(), tensor.stride(0), tensor.stride(1))

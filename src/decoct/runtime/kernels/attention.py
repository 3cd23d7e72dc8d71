"""Attention of a prompt's tokens by the compiled kernels."""

import torch
from jaxtyping import Float
from torch import Tensor

from decoct.runtime.kernels.library import FLOATS, LEVELS, TYPES, Attention, library


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
            seen=keys.shape[1], query_stride=queries.stride(0), key_stride=keys.stride(0), window=window or 0,
            scale=scale, score_cap=score_cap or 0.0, queries=queries.data_ptr(), keys=keys.data_ptr(),
            values=values.data_ptr(), out=out.data_ptr(),
        ),
        LEVELS.index(kernels.levels[-1]),
    )  # fmt: skip
    return out


def _readable(queries: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether channels of a token, and tokens of a head, lie one after the other."""
    channels = queries.shape[2]
    return (
        all(each.dtype == queries.dtype and each.device.type == "cpu" for each in (queries, keys, values))
        and queries.dtype in FLOATS
        and queries.stride()[1:] == (channels, 1)
        and keys.stride()[1:] == (channels, 1)
        and values.stride() == keys.stride()
    )

"""Causal attention of many tokens by the compiled kernels, and its gradients."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from typing_extensions import override

from decoct.native.library import FLOATS, TYPES, Attention, AttentionGradient, Heads, Library, library

_FASTER = ("avx2", "avx512", "avx512bf16")  # than torch; at other levels torch attends


def attend(
    queries: Float[Tensor, "sequences heads tokens channels"],
    keys: Float[Tensor, "sequences kv_heads seen channels"],
    values: Float[Tensor, "sequences kv_heads seen channels"],
    *,
    scale: float,
    score_cap: float | None = None,
    window: int | None = None,
) -> Float[Tensor, "sequences tokens heads channels"] | None:
    """Causal attention of each sequence's newest tokens, in float32; but a softmax is rounded, as torch's is.

    Args:
        queries: of any float dtype, as are the others.
        keys: of all tokens seen, those of the queries last.
        values: the same.
        scale: of scores.
        score_cap: scores are squashed to less than this; None: not at all.
        window: tokens that one sees, itself among them; None: all.

    Returns:
        What was found; None where the kernels cannot read the tensors as they lie, or cannot differentiate (caps, and
        sequences of which only the newest tokens are asked for).
    """
    assert queries.shape[1] % keys.shape[1] == 0
    assert queries.shape[2] <= keys.shape[2]
    kernels = library()
    if kernels is None or kernels.levels[-1] not in _FASTER or values.shape != keys.shape:
        return None
    if not _readable(queries, keys, values):
        return None
    given = _Given(queries, keys, values, scale, score_cap, window)
    if torch.is_grad_enabled() and (queries.requires_grad or keys.requires_grad or values.requires_grad):
        if score_cap is not None or queries.shape[2] != keys.shape[2]:
            return None
        differentiable: Tensor = _Differentiable.apply(*given)  # type: ignore[no-untyped-call]
        return differentiable
    out = given.room()
    kernels.attend(given.described(out, None))
    return out


class _Given(NamedTuple):
    """What `attend` was called with."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    scale: float
    score_cap: float | None
    window: int | None

    def room(self) -> Float[Tensor, "sequences tokens heads channels"]:
        """For what is found."""
        sequences, heads, tokens, channels = self.queries.shape
        return torch.empty(sequences, tokens, heads, channels, dtype=self.queries.dtype)

    def described(self, out: Tensor, levels: Tensor | None) -> Attention:
        """As the kernels want it told; the tensors have to live on until they are done."""
        sequences, heads, tokens, channels = self.queries.shape
        return Attention(
            type=TYPES[out.dtype], sequences=sequences, heads=heads, kv_heads=self.keys.shape[1], head_size=channels,
            tokens=tokens, seen=self.keys.shape[2], window=self.window or 0, scale=self.scale,
            score_cap=self.score_cap or 0.0, queries=_heads(self.queries), keys=_heads(self.keys),
            values=_heads(self.values), out=out.data_ptr(), levels=None if levels is None else levels.data_ptr(),
        )  # fmt: skip


class _Differentiable(torch.autograd.Function):
    """Attention of whole sequences, which remembers the sums of its softmax instead of its scores."""

    @staticmethod
    @override
    def forward(ctx: Any, *given: Any) -> Tensor:
        asked = _Given(*given)
        out, levels = asked.room(), torch.empty(asked.queries.shape[:3], dtype=torch.float32)
        _kernels().attend(asked.described(out, levels))
        ctx.save_for_backward(asked.queries, asked.keys, asked.values, out, levels)
        ctx.settings = asked[3:]
        return out

    @staticmethod
    @once_differentiable
    @override
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, out, levels = ctx.saved_tensors
        upstream = gradients[0] if gradients[0].stride(3) == 1 else gradients[0].contiguous()
        found = [torch.empty_like(each.transpose(1, 2), memory_format=torch.contiguous_format) for each in tensors]
        _kernels().attend_backward(
            AttentionGradient(
                forward=_Given(*tensors, *ctx.settings).described(out, levels), out=_heads(upstream.transpose(1, 2)),
                queries=found[0].data_ptr(), keys=found[1].data_ptr(), values=found[2].data_ptr(),
            )
        )  # fmt: skip
        return *(each.transpose(1, 2) for each in found), None, None, None


def _kernels() -> Library:
    """Where `attend` has found that they are there."""
    kernels = library()
    assert kernels is not None
    return kernels


def _readable(*tensors: Tensor) -> bool:
    """Whether the kernels know the dtype, and channels lie one after the other."""
    dtype = tensors[0].dtype
    return dtype in FLOATS and all(
        each.dtype == dtype and each.device.type == "cpu" and each.stride(3) == 1 for each in tensors
    )


def _heads(tensor: Float[Tensor, "sequences heads tokens channels"]) -> Heads:
    return Heads(tensor.data_ptr(), *tensor.stride()[:3])

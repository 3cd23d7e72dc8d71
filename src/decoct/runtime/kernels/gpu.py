"""Products on a GPU: whole-number weights by Triton kernels that read them packed, everything else by torch."""

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from decoct.runtime.kernels.product import MOST_DIRECT
from decoct.weights import GroupInt, Weight

_TOKENS = 16  # of inputs that a program multiplies with: what a tensor core takes at least
_MOST_COLS, _LEAST_COLS = 128, 16  # of a row that a program reads at a time
_ROWS = 16
_DEVICES = ("cuda",)  # tests add the CPU, where Triton interprets kernels if told so before it is imported


def linear_on_gpu(
    weight: Weight, x: Float[Tensor, "*tokens in"], bias: Tensor | None = None
) -> Float[Tensor, "*tokens out"]:
    """x·Wᵀ + b in x's dtype, on the GPU where all lie; differentiable in x.

    Few inputs are multiplied with packed codes; for many the matrix is unpacked, which pays then. What Triton's kernels
    do not know is unpacked by torch.
    """
    cols = _span(weight)
    if weight.quantizes_inputs:
        y = weight.apply(x)
        return y if bias is None else y + bias
    if cols is None:
        return torch.nn.functional.linear(x, weight.unpack(x.dtype), bias)
    assert isinstance(weight, GroupInt)
    tokens = x.reshape(-1, weight.shape[1]).contiguous()
    if len(tokens) > MOST_DIRECT or (x.requires_grad and torch.is_grad_enabled()):
        return torch.nn.functional.linear(x, _unpack(weight, cols, x.dtype), bias)
    y = x.new_empty(len(tokens), weight.shape[0])
    if len(tokens):
        grid = (-(-weight.shape[0] // _ROWS), -(-len(tokens) // _TOKENS))
        with _on(x.device):
            _source().multiply[grid](
                tokens, *_stored(weight), y, len(tokens), *_sizes(weight), TOKENS=_TOKENS, ROWS=_ROWS, COLS=cols,
                **_kind(weight),
            )  # fmt: skip
    y = y.reshape(*x.shape[:-1], weight.shape[0])
    return y if bias is None else y + bias


def available(device: torch.device) -> bool:
    """Whether Triton's kernels run on a device."""
    return device.type in _DEVICES and _has_triton()


def gpu_kernels() -> str:
    """What multiplies on a GPU, for people."""
    return "Triton kernels" if _has_triton() else "weights unpacked by torch (faster with pip install triton)"


def _unpack(weight: GroupInt, cols: int, dtype: torch.dtype) -> Float[Tensor, "out in"]:
    """The matrix, the same as `weight.unpack(dtype)`, without anything in between."""
    values = torch.empty(weight.shape, dtype=dtype, device=weight.codes.device)
    grid = (-(-weight.shape[0] // _ROWS), -(-weight.shape[1] // cols))
    with _on(values.device):
        _source().unpack[grid](*_stored(weight), values, *_sizes(weight), ROWS=_ROWS, COLS=cols, **_kind(weight))
    return values


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Triton starts kernels on torch's current GPU, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _span(weight: Weight) -> int | None:
    """Columns for a program's step, all of one group; None: no kernel for such a weight."""
    if not isinstance(weight, GroupInt):
        return None
    if weight.scale.shape[1] == 1:
        return _MOST_COLS
    widest = weight.group_size & -weight.group_size
    return min(widest, _MOST_COLS) if widest >= _LEAST_COLS else None


def _stored(weight: GroupInt) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and zero points; scales where there are no zero points, which the kernel then does not read."""
    return weight.codes, weight.scale, weight.scale if weight.zero is None else weight.zero


def _sizes(weight: GroupInt) -> tuple[int, ...]:
    """As both kernels take them; a stride of 0 where all rows share one scale."""
    shared = weight.scale.shape[0] == 1
    strides = [0 if shared else each.stride(0) for each in _stored(weight)[1:]]
    return (*weight.shape, weight.scale.shape[1], weight.group_size, weight.codes.stride(0), *strides)


def _kind(weight: GroupInt) -> dict[str, int]:
    source = _source()
    if weight.zero is None:
        zero = source.NO_ZERO
    else:
        zero = source.REAL_ZERO if weight.zero.is_floating_point() else source.PACKED_ZERO
    return {"BITS": weight.bits, "ZERO": zero}


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


@cache
def _source() -> Any:
    from decoct.runtime.kernels import gpu_source

    return gpu_source

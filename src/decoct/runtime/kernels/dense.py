"""Products of many inputs with an unpacked matrix, in the dtype in which this processor makes them fastest."""

import time
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear

_SIDE = 256  # of the matrices that the processor is tried with: a few milliseconds at the slowest
_TRIES = 3
_SLOWER = 1.5  # times, from which on converting pays: it takes a pass over inputs and matrix
_AT_ONCE = 1 << 22  # entries of the matrix that are converted together


def dense_product(x: Float[Tensor, "*tokens in"], matrix: Float[Tensor, "out in"]) -> Float[Tensor, "*tokens out"]:
    """x·matrixᵀ in x's dtype. Both are of one dtype.

    Processors without instructions for 16 bits multiply such numbers at a fraction of float32's speed. There, float32
    multiplies the same numbers, and the result is rounded once, as it is in 16 bits.
    """
    if x.device.type != "cpu" or (torch.is_grad_enabled() and x.requires_grad) or not _slow(x.dtype):
        return linear(x, matrix)  # a gradient would keep the wider matrix
    wide = x.float()
    with torch.autocast("cpu", enabled=False):
        parts = torch.split(matrix, max(1, _AT_ONCE // matrix.shape[1]))
        return torch.cat([linear(wide, part.float()).to(x.dtype) for part in parts], -1)


@cache
def _slow(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies numbers of this dtype more slowly than float32; measured once in a process."""
    if dtype not in (torch.float16, torch.bfloat16):
        return False
    return _seconds(dtype) > _SLOWER * _seconds(torch.float32)


def _seconds(dtype: torch.dtype) -> float:
    """The least that a small product takes, whatever autocast and default device say."""
    factor = torch.ones(_SIDE, _SIDE, dtype=dtype, device="cpu")
    found = []
    with torch.autocast("cpu", enabled=False), torch.no_grad():
        for _ in range(_TRIES):
            started = time.perf_counter()
            linear(factor, factor)
            found.append(time.perf_counter() - started)
    return min(found)

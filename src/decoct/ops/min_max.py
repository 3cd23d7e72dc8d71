"""Asymmetric uniform levels between a group's smallest and largest number, for values that are not centred on zero.

Keys and values of an attention cache have channels that lie far from zero on one side. So the grid begins at the
group's minimum, a real number, and zero need not be on it (unlike in `ops/grid.py`, where masks need a zero).
"""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from decoct.ops.packing import pack_bits, unpack_bits

_HALF = torch.finfo(torch.float16)


def pack_between(
    x: Float[Tensor, "*groups n"], bits: int
) -> tuple[UInt8[Tensor, "*groups bytes"], Float[Tensor, "*groups"], Float[Tensor, "*groups"]]:
    """Codes of x ≈ low + code · step, packed, with each group's step and low in float16.

    Both are rounded to float16 before codes are chosen, so that rounding them costs as little as it can. What float16
    cannot hold (beyond 65504) is clamped to what it can.

    Args:
        x: groups along the last axis; any float dtype.
        bits: 2 to 8; n · bits should fill whole bytes, the last byte is padded otherwise.

    Returns:
        (codes uint8, step float16, low float16).
    """
    values = x.float()
    lowest, highest = values.amin(-1).clamp(_HALF.min, _HALF.max), values.amax(-1).clamp(_HALF.min, _HALF.max)
    low = lowest.to(torch.float16)
    # From the rounded minimum, or the largest number might have no code.
    step = ((highest - low.float()) / (2**bits - 1)).clamp(min=_HALF.smallest_normal * _HALF.eps).to(torch.float16)
    codes = values.sub(low.float().unsqueeze(-1)).div_(step.float().unsqueeze(-1)).round_().clamp_(0, 2**bits - 1)
    return pack_bits(codes.to(torch.uint8), bits), step, low


def unpack_between(
    codes: UInt8[Tensor, "*groups bytes"],
    step: Float[Tensor, "*groups"],
    low: Float[Tensor, "*groups"],
    bits: int,
    count: int,
) -> Float[Tensor, "*groups n"]:
    """Undo `pack_between`, float32; `count` numbers in each group."""
    values = unpack_bits(codes, bits, count).float()
    return values.mul_(step.float().unsqueeze(-1)).add_(low.float().unsqueeze(-1))


def pack_by_channel(x: Float[Tensor, "batch heads tokens channels"], size: int, bits: int) -> dict[str, Tensor]:
    """Groups of `size` tokens of each channel; one entry for each group along axis 2."""
    grouped = x.reshape(*x.shape[:2], -1, size, x.shape[3]).transpose(-1, -2)
    codes, step, low = pack_between(grouped, bits)
    return {"codes": codes, "step": step, "low": low}


def unpack_by_channel(packed: dict[str, Tensor], size: int, bits: int) -> Float[Tensor, "batch heads tokens channels"]:
    """Undo `pack_by_channel`, float32."""
    values = unpack_between(packed["codes"], packed["step"], packed["low"], bits, size)
    return values.transpose(-1, -2).flatten(2, 3)


def pack_by_token(x: Float[Tensor, "batch heads tokens channels"], size: int, bits: int) -> dict[str, Tensor]:
    """Groups of `size` channels of each token; one entry for each token along axis 2."""
    codes, step, low = pack_between(x.reshape(*x.shape[:3], -1, size), bits)
    return {"codes": codes, "step": step, "low": low}


def unpack_by_token(packed: dict[str, Tensor], size: int, bits: int) -> Float[Tensor, "batch heads tokens channels"]:
    """Undo `pack_by_token`, float32."""
    return unpack_between(packed["codes"], packed["step"], packed["low"], bits, size).flatten(-2)

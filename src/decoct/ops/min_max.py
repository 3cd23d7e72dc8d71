"""Asymmetric levels between a group's smallest and largest number, for values that are not centred on zero.

Keys and values of an attention cache have channels that lie far from zero on one side. So the grid begins at the
group's minimum, a real number, and zero need not be on it (unlike in `ops/grid.py`, where masks need a zero). Levels
are evenly spaced, or lie where a table says. The most extreme entries may be kept aside (`ops/set_aside.py`): then the
grid spans the others alone.
"""

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from decoct.ops.packing import pack_bits, unpack_bits
from decoct.ops.set_aside import put_back, set_aside

_HALF = torch.finfo(torch.float16)


def ends(
    x: Float[Tensor, "*groups n"], aside: Bool[Tensor, "*groups n"] | None, steps: int
) -> tuple[Float[Tensor, "*groups"], Float[Tensor, "*groups"]]:
    """Each group's step and minimum in float16, with `steps` of them between its ends.

    What float16 cannot hold (beyond 65504) is clamped to what it can.

    Args:
        x: float32, groups along the last axis.
        aside: entries that the grid need not reach; None: none.
        steps: 1 for the whole span.

    Returns:
        (step float16, above zero; low float16).
    """
    lowest = x.amin(-1) if aside is None else x.masked_fill(aside, torch.inf).amin(-1)
    highest = x.amax(-1) if aside is None else x.masked_fill(aside, -torch.inf).amax(-1)
    low = lowest.clamp(_HALF.min, _HALF.max).to(torch.float16)
    # From the rounded minimum, or the largest number might have no code.
    step = (highest.clamp(_HALF.min, _HALF.max) - low.float()) / steps
    return step.clamp(_HALF.smallest_normal * _HALF.eps, _HALF.max).to(torch.float16), low


def pack_between(
    x: Float[Tensor, "*groups n"],
    bits: int,
    levels: Float[Tensor, " levels"] | None = None,
    aside: Bool[Tensor, "*groups n"] | None = None,
) -> tuple[UInt8[Tensor, "*groups bytes"], Float[Tensor, "*groups"], Float[Tensor, "*groups"]]:
    """Codes of x ≈ low + code · step, or of x ≈ low + levels[code] · step, with step and low in float16.

    Both are rounded to float16 before codes are chosen, so that rounding them costs as little as it can.

    Args:
        x: groups along the last axis; any float dtype.
        bits: 2 to 8; n · bits should fill whole bytes, the last byte is padded otherwise.
        levels: 2^bits of them, ascending, where 0 is a group's minimum and 1 its maximum; None: evenly spaced.
        aside: entries that the grid need not reach; they have a code all the same. None: none.

    Returns:
        (codes uint8, step float16, low float16).
    """
    values = x.float()
    step, low = ends(values, aside, 2**bits - 1 if levels is None else 1)
    scaled = values.sub(low.float().unsqueeze(-1)).div_(step.float().unsqueeze(-1))
    if levels is None:
        codes = scaled.round_().clamp_(0, 2**bits - 1).to(torch.uint8)
    else:
        middles = (levels[1:] + levels[:-1]) / 2
        codes = torch.bucketize(scaled.contiguous(), middles.to(scaled.device), out_int32=True).to(torch.uint8)
    return pack_bits(codes, bits), step, low


def unpack_between(
    codes: UInt8[Tensor, "*groups bytes"],
    step: Float[Tensor, "*groups"],
    low: Float[Tensor, "*groups"],
    bits: int,
    count: int,
    levels: Float[Tensor, " levels"] | None = None,
) -> Float[Tensor, "*groups n"]:
    """Undo `pack_between`, float32; `count` numbers in each group."""
    found = unpack_bits(codes, bits, count)
    values = found.float() if levels is None else levels.to(found.device)[found.int()]
    return values.mul_(step.float().unsqueeze(-1)).add_(low.float().unsqueeze(-1))


def by_channel(x: Float[Tensor, "batch heads tokens channels"], size: int) -> Float[Tensor, "batch heads n channels s"]:
    """Groups of `size` tokens of each channel, along the last axis; float32."""
    return x.float().reshape(*x.shape[:2], -1, size, x.shape[3]).transpose(-1, -2).contiguous()


def by_token(x: Float[Tensor, "batch heads tokens channels"], size: int) -> Float[Tensor, "batch tokens groups s"]:
    """Groups of `size` channels of each token, along the last axis, those of all heads side by side; float32."""
    return x.float().transpose(1, 2).reshape(x.shape[0], x.shape[2], -1, size)


def pack_by_channel(
    x: Float[Tensor, "batch heads tokens channels"],
    size: int,
    bits: int,
    levels: Float[Tensor, " levels"] | None = None,
    outliers: int = 0,
) -> dict[str, Tensor]:
    """Groups of `size` tokens of each channel; one entry for each group along axis 2.

    Args:
        x: keys.
        size: divides the tokens.
        bits: 2 to 8.
        levels: as in `pack_between`.
        outliers: entries of a head in `size` tokens that are kept aside, in 16 bits.
    """
    grouped = by_channel(x, size)
    kept, aside = set_aside(grouped, outliers) if outliers else ({}, None)
    codes, step, low = pack_between(grouped, bits, levels, aside)
    return {"codes": codes, "step": step, "low": low, **kept}


def unpack_by_channel(
    packed: dict[str, Tensor], size: int, bits: int, levels: Float[Tensor, " levels"] | None = None
) -> Float[Tensor, "batch heads tokens channels"]:
    """Undo `pack_by_channel`, float32."""
    values = unpack_between(packed["codes"], packed["step"], packed["low"], bits, size, levels)
    return put_back(values, packed).transpose(-1, -2).flatten(2, 3)


def pack_by_token(
    x: Float[Tensor, "batch heads tokens channels"],
    size: int,
    bits: int,
    levels: Float[Tensor, " levels"] | None = None,
    outliers: int = 0,
) -> dict[str, Tensor]:
    """Groups of `size` channels of each token; one entry for each token along axis 2.

    Args:
        x: values.
        size: divides the channels.
        bits: 2 to 8.
        levels: as in `pack_between`.
        outliers: entries of a token, in all heads together, that are kept aside, in 16 bits: axis 1 has length 1 there.
    """
    shape = (*x.shape[:3], -1, size)
    kept, aside = {}, None
    if outliers:
        found, mask = set_aside(by_token(x, size), outliers)
        kept = {name: tensor.unsqueeze(1) for name, tensor in found.items()}
        aside = mask.reshape(x.shape[0], x.shape[2], x.shape[1], -1).transpose(1, 2).reshape(shape)
    codes, step, low = pack_between(x.reshape(shape), bits, levels, aside)
    return {"codes": codes, "step": step, "low": low, **kept}


def unpack_by_token(
    packed: dict[str, Tensor], size: int, bits: int, levels: Float[Tensor, " levels"] | None = None
) -> Float[Tensor, "batch heads tokens channels"]:
    """Undo `pack_by_token`, float32."""
    values = unpack_between(packed["codes"], packed["step"], packed["low"], bits, size, levels).flatten(-2)
    if "outliers" not in packed:
        return values
    tokens = values.transpose(1, 2)
    kept = {name: packed[name].squeeze(1) for name in ("outliers", "positions")}
    return put_back(tokens, kept).transpose(1, 2)

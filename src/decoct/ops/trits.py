"""Base-3 packing: five values of {-1, 0, 1} fill one byte (3^5 = 243), so a value takes 1.6 bits."""

import torch
from jaxtyping import Int, Int8, UInt8
from torch import Tensor

_PER_BYTE = 5
_POWERS = tuple(3**k for k in range(_PER_BYTE))


def trit_width(count: int) -> int:
    """Bytes that `count` trits take."""
    return -(-count // _PER_BYTE)


def pack_trits(trits: Int[Tensor, "*rows n"]) -> UInt8[Tensor, "*rows bytes"]:
    """Pack values of {-1, 0, 1} along the last axis, the first one in the lowest place; each row starts at a byte.

    Returns:
        uint8 [..., ceil(n / 5)], the last byte padded with zeros (the value 0).
    """
    n = trits.shape[-1]
    padded = torch.nn.functional.pad(trits.to(torch.int8), (0, -n % _PER_BYTE))
    places = padded.reshape(*trits.shape[:-1], trit_width(n), _PER_BYTE)
    byte = torch.full(places.shape[:-1], sum(_POWERS), dtype=torch.int16, device=trits.device)  # what five zeros give
    for k, power in enumerate(_POWERS):
        byte += places[..., k].to(torch.int16) * power
    return byte.to(torch.uint8)


def unpack_trits(packed: UInt8[Tensor, "*rows bytes"], count: int) -> Int8[Tensor, "*rows n"]:
    """Undo `pack_trits`: the first `count` values of each row.

    Raises:
        ValueError: a row is shorter than `count` trits need.
    """
    if packed.shape[-1] < trit_width(count):
        raise ValueError(f"{packed.shape[-1]} bytes cannot hold {count} trits; the tensor is truncated")
    table = torch.arange(256, device=packed.device).unsqueeze(-1) // torch.tensor(_POWERS, device=packed.device) % 3 - 1
    return table.to(torch.int8)[packed.int()].flatten(-2)[..., :count]

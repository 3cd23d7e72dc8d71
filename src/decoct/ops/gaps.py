"""Where a few entries lie among many: the runs between them as short codes, near the entropy of random positions.

A bitmap costs one bit for every place and a column number 16 bits for every entry. Between the two, the number of empty
places before each entry fits a few bits; a run too long for that is written as several codes.
"""

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from decoct.ops.packing import pack_bits, packed_width, unpack_bits


def pack_positions(positions: Int64[Tensor, " n"]) -> tuple[UInt8[Tensor, " bytes"], int, int]:
    """Encode rising positions, in as few bytes as any width of code allows.

    With codes of b bits, a code c below 2^b - 1 stands for c empty places and then an entry; the largest code stands
    for 2^b - 1 empty places and no entry.

    Args:
        positions: strictly rising, from 0.

    Returns:
        The codes as a bit stream, the bits of each, and how many there are.
    """
    before = torch.cat([positions.new_full((1,), -1), positions[:-1]])[: positions.numel()]
    runs = positions - before - 1
    counts = {bits: positions.numel() + int((runs // (2**bits - 1)).sum()) for bits in range(1, 9)}
    bits = min(counts, key=lambda b: (packed_width(counts[b], b), b))
    longest = 2**bits - 1
    codes = torch.full((counts[bits],), longest, dtype=torch.uint8, device=positions.device)
    ends = (runs // longest + 1).cumsum(0) - 1
    codes[ends] = (runs % longest).to(torch.uint8)
    return pack_bits(codes, bits), bits, counts[bits]


def unpack_positions(packed: UInt8[Tensor, " bytes"], bits: int, count: int) -> Int64[Tensor, " n"]:
    """Undo `pack_positions`.

    Args:
        packed: the stream.
        bits: of each code.
        count: codes in the stream; more than there are positions where runs are long.
    """
    codes = unpack_bits(packed, bits, count)
    entry = codes != 2**bits - 1
    places: Tensor = (codes.to(torch.int64) + entry).cumsum(0) - 1
    return places[entry]

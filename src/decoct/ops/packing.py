"""Dense bit packing: integers of 1 to 8 bits stored as one contiguous stream, so three bits take three bits."""

import torch
from jaxtyping import Bool, Int, Int32, UInt8
from torch import Tensor

_LANES = 8  # eight codes of b bits fill exactly b bytes, whatever b is


def packed_width(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take, the last byte padded with zeros."""
    return (count * bits + 7) // 8


def pack_bits(codes: Int[Tensor, "*rows n"], bits: int) -> UInt8[Tensor, "*rows bytes"]:
    """Pack unsigned codes along the last axis, least significant bit first; each row starts at a byte.

    Args:
        codes: integers in [0, 2**bits).
        bits: 1 to 8.

    Returns:
        uint8 [..., ceil(n * bits / 8)].

    Raises:
        ValueError: `bits` is not in 1..8.
    """
    _check_bits(bits)
    codes = codes.to(torch.uint8)
    if bits == 8:
        return codes
    n = codes.shape[-1]
    width = packed_width(n, bits)
    padded = torch.nn.functional.pad(codes, (0, -n % _LANES)) if n % _LANES else codes
    lanes = padded.reshape(*codes.shape[:-1], padded.shape[-1] // _LANES, _LANES)
    packed = _pack_aligned(lanes, bits) if bits in (1, 2, 4) else _pack_straddling(lanes, bits)
    return packed.flatten(-2)[..., :width].contiguous()


def unpack_bits(packed: UInt8[Tensor, "*rows bytes"], bits: int, count: int) -> UInt8[Tensor, "*rows n"]:
    """Undo `pack_bits`: the first `count` codes of each row.

    Raises:
        ValueError: `bits` is not in 1..8, or a row is shorter than `count` codes need.
    """
    _check_bits(bits)
    if packed.shape[-1] < packed_width(count, bits):
        raise ValueError(f"{packed.shape[-1]} bytes cannot hold {count} codes of {bits} bits; the tensor is truncated")
    if bits == 8:
        return packed[..., :count]
    if bits in (1, 2, 4):
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
        aligned: Tensor = (packed.unsqueeze(-1) >> shifts) & (2**bits - 1)
        return aligned.flatten(-2)[..., :count]
    padded = torch.nn.functional.pad(packed, (0, -packed.shape[-1] % bits))
    words = padded.reshape(*packed.shape[:-1], padded.shape[-1] // bits, bits).to(torch.int64)
    word = words[..., 0].clone()
    for byte in range(1, bits):
        word |= words[..., byte] << (8 * byte)
    shifts = torch.arange(_LANES, device=packed.device) * bits
    codes: Tensor = (word.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return codes.to(torch.uint8).flatten(-2)[..., :count]


def pack_mask(mask: Bool[Tensor, "*rows n"]) -> UInt8[Tensor, "*rows bytes"]:
    """One bit an entry."""
    return pack_bits(mask.to(torch.uint8), 1)


def unpack_mask(packed: UInt8[Tensor, "*rows bytes"], count: int) -> Bool[Tensor, "*rows n"]:
    """Undo `pack_mask`."""
    return unpack_bits(packed, 1, count).to(torch.bool)


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be 1 to 8, not {bits}")


def _pack_aligned(lanes: UInt8[Tensor, "*rows groups 8"], bits: int) -> UInt8[Tensor, "*rows groups b"]:
    """Codes that never straddle a byte: neighbours are joined in wider words until eight bits are full."""
    words, joined = lanes.contiguous(), bits
    while joined < 8:
        pairs = words.view(torch.int16)  # little-endian: the first of a pair is the low byte
        words = ((pairs >> (8 - joined)) | pairs).to(torch.uint8)
        joined *= 2
    return words


def _pack_straddling(lanes: UInt8[Tensor, "*rows groups 8"], bits: int) -> UInt8[Tensor, "*rows groups b"]:
    """Codes of 3, 5, 6, 7 bits: or eight of them into one 64-bit word, then cut the word into bytes."""
    wide = lanes.to(torch.int64)
    word = wide[..., 0].clone()
    for k in range(1, _LANES):
        word |= wide[..., k] << (bits * k)
    shifts = torch.arange(bits, device=lanes.device) * 8
    return ((word.unsqueeze(-1) >> shifts) & 0xFF).to(torch.uint8)


def pack_words(codes: Int[Tensor, "*rows n"], bits: int) -> Int32[Tensor, "*rows words"]:
    """The stream of `pack_bits` as words of 32 bits, the first code lowest.

    Raises:
        ValueError: `bits` is not in 1..8, or the codes do not fill whole words.
    """
    if codes.shape[-1] * bits % 32:
        raise ValueError(f"{codes.shape[-1]} codes of {bits} bits do not fill whole words of 32 bits")
    packed = pack_bits(codes, bits)
    return packed.reshape(*packed.shape[:-1], -1, 4).contiguous().view(torch.int32).squeeze(-1)


def unpack_words(words: Int32[Tensor, "*rows words"], bits: int) -> UInt8[Tensor, "*rows n"]:
    """Undo `pack_words`."""
    stream = words.contiguous().unsqueeze(-1).view(torch.uint8).flatten(-2)
    return unpack_bits(stream, bits, words.shape[-1] * 32 // bits)

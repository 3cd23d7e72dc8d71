"""Codes and scales laid into the blocks of llama.cpp's tensor types, byte for byte.

A row of a matrix is a row of blocks, each of 32 or 256 neighbouring entries with its scales among its codes. Everything
here is layout: which numbers go in is decided elsewhere (`ggml_fit.py`, or codes that are given). The `gguf` package
reads all of it back, which the tests rely on.
"""

import torch
from jaxtyping import Float, Int, Int8, UInt8
from torch import Tensor

from decoct.ops.packing import pack_bits

BLOCKS: dict[str, tuple[int, int]] = {
    "F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22),
    "Q5_1": (32, 24), "Q8_0": (32, 34), "IQ4_NL": (32, 18), "MXFP4": (32, 17), "Q2_K": (256, 84), "Q3_K": (256, 110),
    "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210), "TQ1_0": (256, 54), "TQ2_0": (256, 66),
}  # fmt: skip
"""Entries and bytes of a block, by type."""

CODE_BITS = {"Q4_0": 4, "Q4_1": 4, "Q5_0": 5, "Q5_1": 5, "Q8_0": 8}
"""Bits of a code in the types whose blocks of 32 have one scale, and those ending in 1 a minimum too."""


def row_bytes(kind: str, cols: int) -> int:
    """Bytes of a row of a matrix in a type.

    Raises:
        ValueError: the type's blocks do not divide the row.
    """
    entries, nbytes = BLOCKS[kind]
    if cols % entries:
        raise ValueError(f"{kind} has blocks of {entries} entries, which do not divide {cols} input features")
    return cols // entries * nbytes


def pack_block32(
    kind: str,
    codes: UInt8[Tensor, "rows cols"],
    scale: Float[Tensor, "rows blocks"],
    minimum: Float[Tensor, "rows blocks"] | None = None,
) -> UInt8[Tensor, "rows bytes"]:
    """Blocks of 32 with a scale: value = scale · (code - 2^(bits-1)), or scale · code + minimum.

    Args:
        kind: one of CODE_BITS.
        codes: unsigned, of as many bits as the type has.
        scale: of each block; stored in float16.
        minimum: of each block, for Q4_1 and Q5_1.
    """
    bits, blocks = CODE_BITS[kind], codes.reshape(codes.shape[0], -1, 32)
    assert (minimum is not None) == kind.endswith("_1")
    fields = [_half(scale)] if minimum is None else [_half(scale), _half(minimum)]
    if bits == 5:
        fields.append(pack_bits(blocks >> 4, 1))
    fields.append(
        _nibbles(blocks & 15) if bits < 8 else (blocks.to(torch.int16) - 128).to(torch.int8).view(torch.uint8)
    )
    return torch.cat(fields, -1).flatten(1)


def pack_nibbles32(codes: UInt8[Tensor, "rows cols"], head: UInt8[Tensor, "rows blocks n"]) -> UInt8[Tensor, "rows b"]:
    """Blocks of 32 codes of 4 bits behind the bytes of their scale: IQ4_NL (float16), MXFP4 (an exponent)."""
    return torch.cat([head, _nibbles(codes.reshape(codes.shape[0], -1, 32))], -1).flatten(1)


def pack_trits(
    kind: str, trits: Int8[Tensor, "rows cols"], scale: Float[Tensor, "rows blocks"]
) -> UInt8[Tensor, "rows bytes"]:
    """TQ1_0 (five trits to a byte) and TQ2_0 (four): value = scale · trit, with a scale for 256 entries."""
    digits = (trits.to(torch.int16) + 1).reshape(trits.shape[0], -1, 256)
    if kind == "TQ2_0":
        return torch.cat([_crumbs(digits.to(torch.uint8)), _half(scale)], -1).flatten(1)
    first, second, last = digits.split_with_sizes([160, 80, 16], -1)
    packed = [_base3(part, count) for part, count in ((first, 5), (second, 5), (last, 4))]
    return torch.cat([*packed, _half(scale)], -1).flatten(1)


def pack_super(
    kind: str,
    codes: UInt8[Tensor, "rows cols"],
    scales: Int[Tensor, "rows blocks subs"],
    minima: Int[Tensor, "rows blocks subs"] | None,
    step: Float[Tensor, "rows blocks"],
    minimum_step: Float[Tensor, "rows blocks"] | None,
) -> UInt8[Tensor, "rows bytes"]:
    """Super-blocks of 256: value = step · scale · code - minimum step · minimum, or step · scale · (code - 2^(bits-1)).

    Args:
        kind: Q2_K to Q6_K.
        codes: unsigned.
        scales: of each sub-block (16 or 32 entries), whole numbers; signed in Q3_K and Q6_K.
        minima: whole numbers, for Q2_K, Q4_K and Q5_K.
        step: what scales are multiples of; stored in float16.
        minimum_step: what minima are multiples of.
    """
    blocks, d = codes.reshape(codes.shape[0], -1, 256), _half(step)
    if kind == "Q3_K":
        fields = [_planes(blocks >> 2), _crumbs(blocks & 3), _six_bits_signed(scales), d]
    elif kind == "Q6_K":
        halves = (blocks & 15).reshape(*blocks.shape[:2], 2, 2, 64)
        low = (halves[..., 0, :] | halves[..., 1, :] << 4).flatten(-2)
        fields = [low, _crumbs(blocks >> 4), scales.to(torch.int8).view(torch.uint8), d]
    else:
        assert minima is not None
        assert minimum_step is not None
        both = [d, _half(minimum_step)]
        if kind == "Q2_K":
            fields = [(scales | minima << 4).to(torch.uint8), _crumbs(blocks), *both]
        else:
            high = [_planes(blocks >> 4)] if kind == "Q5_K" else []
            fields = [*both, _six_bits(scales, minima), *high, _pairs(blocks & 15)]
    return torch.cat(fields, -1).flatten(1)


def _half(values: Tensor) -> Tensor:
    """The two bytes of each as float16, on an axis of their own."""
    return values.to(torch.float16).contiguous().unsqueeze(-1).view(torch.uint8)


def _nibbles(blocks: Tensor) -> Tensor:
    """The first half of 32 codes in the low four bits, the second in the high ones."""
    return blocks[..., :16] | blocks[..., 16:] << 4


def _pairs(blocks: Tensor) -> Tensor:
    """Of every 64 codes, the first 32 low, the others high."""
    runs = blocks.reshape(*blocks.shape[:2], 4, 2, 32)
    return (runs[..., 0, :] | runs[..., 1, :] << 4).flatten(-2)


def _crumbs(blocks: Tensor) -> Tensor:
    """Two bits: of every 128 codes, four runs of 32 share 32 bytes, the first run lowest."""
    runs = blocks.reshape(*blocks.shape[:2], 2, 4, 32)
    return (runs[..., 0, :] | runs[..., 1, :] << 2 | runs[..., 2, :] << 4 | runs[..., 3, :] << 6).flatten(-2)


def _planes(blocks: Tensor) -> Tensor:
    """One bit: eight runs of 32 share 32 bytes, the first run lowest."""
    runs = blocks.reshape(*blocks.shape[:2], 8, 32).transpose(-1, -2)
    return pack_bits(runs, 1).squeeze(-1)


def _base3(digits: Tensor, count: int) -> Tensor:
    """`count` digits as a fraction of 256, so that multiplying by three brings the next one above the byte."""
    runs = digits.reshape(*digits.shape[:2], -1, count, 32 if digits.shape[-1] == 160 else digits.shape[-1] // count)
    powers = torch.tensor([81, 27, 9, 3, 1][:count], dtype=torch.int16).reshape(count, 1)
    number = (runs * powers).sum(-2).flatten(-2)
    return ((number * 256 + 242) // 243).to(torch.uint8)


def _six_bits(scales: Tensor, minima: Tensor) -> Tensor:
    """Eight scales and eight minima of 6 bits in 12 bytes: the last four lend their high bits to the first four."""
    scales, minima = scales.to(torch.uint8), minima.to(torch.uint8)
    first = scales[..., :4] | (scales[..., 4:] >> 4) << 6
    second = minima[..., :4] | (minima[..., 4:] >> 4) << 6
    third = (scales[..., 4:] & 15) | (minima[..., 4:] & 15) << 4
    return torch.cat([first, second, third], -1)


def _six_bits_signed(scales: Tensor) -> Tensor:
    """Sixteen scales from -32 to 31 in 12 bytes: low nibbles, then the two high bits of four scales in a byte."""
    raised = (scales + 32).to(torch.uint8)
    low = (raised[..., :8] & 15) | (raised[..., 8:] & 15) << 4
    high = (raised >> 4).reshape(*raised.shape[:2], 4, 4)
    return torch.cat([low, high[..., 0, :] | high[..., 1, :] << 2 | high[..., 2, :] << 4 | high[..., 3, :] << 6], -1)

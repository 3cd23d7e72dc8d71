"""Triton kernels for whole-number weights as they are stored; imported when one is first called, for it needs triton.

Codes are streams of 2 to 8 bits, scales and zero points belong to groups of input features. Products are of codes with
inputs, exact in either 16-bit format (and on tensor cores where a GPU has them for it); a group's scale and zero point
follow once for all of it.
"""

# Triton reads these functions as source: arguments in capitals are constants of a compilation.
# ruff: noqa: PLR0913

import triton
import triton.language as tl

NO_ZERO, PACKED_ZERO, REAL_ZERO = 0, 1, 2
"""Where zero points come from: all in the middle, streams of codes, numbers."""


@triton.jit
def _codes(stream, bit, mask, BITS: tl.constexpr):
    """Codes that begin at these bits of a stream; one may lie across two bytes."""
    at = bit >> 3
    shift = (bit & 7).to(tl.int32)
    found = tl.load(stream + at, mask=mask, other=0).to(tl.int32)
    if 8 % BITS != 0:
        across = mask & (shift + BITS > 8)
        found = found | (tl.load(stream + at + 1, mask=across, other=0).to(tl.int32) << 8)
    return (found >> shift) & ((1 << BITS) - 1)


@triton.jit
def _zeros(zero, rows, group, mask, zero_stride, BITS: tl.constexpr, ZERO: tl.constexpr):
    """Zero points of one group of some rows, float32."""
    if ZERO == 1:
        return _codes(zero + rows * zero_stride, tl.zeros_like(rows) + group * BITS, mask, BITS).to(tl.float32)
    if ZERO == 2:
        return tl.load(zero + rows * zero_stride + group, mask=mask, other=0).to(tl.float32)
    return tl.zeros(rows.shape, tl.float32) + (1 << (BITS - 1))


@triton.jit
def multiply(
    x, codes, scale, zero, y, tokens, out, cols, groups, group_size,
    code_stride, scale_stride, zero_stride,
    BITS: tl.constexpr, ZERO: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Products of x [tokens, cols] with the matrix, to y [tokens, out]; COLS divides a group, or one is all."""
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    real = row < out
    total = tl.zeros((TOKENS, ROWS), tl.float32)
    for first in range(0, cols, COLS):
        col = first + tl.arange(0, COLS)
        inside = col < cols
        taken = tl.load(
            x + token[:, None] * cols + col[None, :], mask=(token < tokens)[:, None] & inside[None, :], other=0
        )
        code = _codes(
            codes + (row * code_stride)[None, :], (col * BITS)[:, None], inside[:, None] & real[None, :], BITS
        )
        # Counted from the middle: a symmetric grid has no zero points left then.
        part = tl.dot(taken, (code - (1 << (BITS - 1))).to(taken.dtype), input_precision="ieee")
        group = tl.where(groups > 1, first // group_size, 0)
        factor = tl.load(scale + row * scale_stride + group, mask=real, other=0).to(tl.float32)
        if ZERO != 0:
            beside = _zeros(zero, row, group, real, zero_stride, BITS, ZERO) - (1 << (BITS - 1))
            part -= tl.sum(taken.to(tl.float32), 1)[:, None] * beside[None, :]
        total += part * factor[None, :]
    where = token.to(tl.int64)[:, None] * out + row[None, :]
    tl.store(y + where, total.to(y.dtype.element_ty), mask=(token < tokens)[:, None] & real[None, :])


@triton.jit
def unpack(
    codes, scale, zero, values, out, cols, groups, group_size, code_stride, scale_stride, zero_stride,
    BITS: tl.constexpr, ZERO: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """The matrix itself, computed in float32 and rounded once, as `decoct.ops.grid.dequantize` does."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    first = tl.program_id(1) * COLS
    col = first + tl.arange(0, COLS)
    real = row < out
    wanted = real[:, None] & (col < cols)[None, :]
    code = _codes(codes + (row * code_stride)[:, None], (col * BITS)[None, :], wanted, BITS).to(tl.float32)
    group = tl.where(groups > 1, first // group_size, 0)
    factor = tl.load(scale + row * scale_stride + group, mask=real, other=0).to(tl.float32)
    middle = _zeros(zero, row, group, real, zero_stride, BITS, ZERO)
    found = (code - middle[:, None]) * factor[:, None]
    tl.store(values + row[:, None] * cols + col[None, :], found.to(values.dtype.element_ty), mask=wanted)

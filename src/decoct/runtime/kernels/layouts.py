"""How weights lie for the kernels: in panels of 16 rows side by side, or row by row as they are stored."""

import torch
from jaxtyping import UInt8
from torch import Tensor

from decoct.native.library import FLOATS, Layout, Library
from decoct.ops.minifloat import ELEMENTS, decode
from decoct.ops.packing import pack_bits, unpack_bits
from decoct.ops.trellis import shortest, window_values
from decoct.ops.trits import unpack_trits
from decoct.runtime.kernels.compiled import BLOCK, Compiled
from decoct.weights import (
    Additive,
    Binary,
    Codebook,
    Dense,
    FloatBlock,
    GroupInt,
    Sparse,
    SparseInt,
    Ternary,
    Trellis,
    TwoLevelInt,
    Weight,
)
from decoct.weights.trellis import sequences_of

_UNIT = 32  # codes that fill whole 32-bit words
_SUBUNIT = 8  # of which groups consist
_FEW = 0.1  # stored entries, of all: with more, values and columns would be larger than a bfloat16 matrix's half


def group_int(library: Library, weight: GroupInt) -> Compiled | None:
    """Integers: codes and scales in panels."""
    zero = weight.zero
    if zero is not None and not zero.is_floating_point():
        zero = unpack_bits(zero, weight.bits, weight.scale.shape[1])
    return _panels(library, weight, Layout.INTS, weight.codes, weight.scale, zero, bits=weight.bits)


def ternary(library: Library, weight: Ternary) -> Compiled | None:
    """Two bits a value: taking base 3 apart would cost more than the bytes that it saves."""
    table = torch.tensor([-1.0, 0.0, 1.0, 0.0]).repeat(4)
    rows = [
        pack_bits(unpack_trits(part, weight.shape[1]) + 1, 2)
        for part in weight.trits.split_with_sizes([*[256] * (len(weight.trits) // 256), len(weight.trits) % 256])
    ]
    codes = torch.cat(rows)
    return _panels(library, weight, Layout.TABLE, codes, weight.scale, None, bits=2, table=table)


def float_block(library: Library, weight: FloatBlock) -> Compiled | None:
    """Small floating-point numbers; scales as bfloat16, which holds what is stored in 8 bits exactly."""
    element = ELEMENTS[weight.element]
    scale = weight.grid().factors() if weight.scale_kind != "real" else weight.scale
    if weight.scale_kind != "real":
        short = scale.bfloat16()
        scale = short if torch.equal(short.float(), scale) else scale
    if element.bits == 4:
        table = decode(torch.arange(16, dtype=torch.uint8), element).float()
        return _panels(library, weight, Layout.TABLE, weight.codes, scale, None, bits=4, table=table)
    return _panels(
        library, weight, Layout.MINIFLOAT, weight.codes, scale, None,
        bits=element.bits, exponent=element.exponent, mantissa=element.mantissa,
    )  # fmt: skip


def dense(library: Library, weight: Dense) -> Compiled | None:
    """The matrix itself, not copied."""
    if weight.values.dtype not in FLOATS:
        return None
    return Compiled(library, weight.shape, weight.dtype, Layout.DENSE, {"values": weight.values.detach()}, {})


def codebook(library: Library, weight: Codebook) -> Compiled | None:
    """Codes as they are stored, tables as float32."""
    table = weight.table.float()
    settings = {"stride": weight.codes.shape[1], "count": weight.codes.numel(), "bits": weight.bits}
    if weight.d == 1 and weight.bits <= 4:
        sixteen = table.squeeze(-1).repeat(1, 16 >> weight.bits)
        return _rows(
            library, weight, Layout.ROW_TABLES, weight.codes, sixteen, rows_per_table=weight.rows_per_table, **settings
        )
    return _rows(
        library, weight, Layout.VECTORS, weight.codes, table,
        rows_per_table=weight.rows_per_table, books=1, d=weight.d, **settings,
    )  # fmt: skip


def additive(library: Library, weight: Additive) -> Compiled | None:
    """Codes as they are stored, codebooks as float32."""
    books, _, d = weight.codebooks.shape
    if d > 8:
        return None
    tensors = {"codes": weight.codes, "table": weight.codebooks.float(), "scale": weight.scale}
    settings = {"stride": weight.codes.shape[2], "count": weight.codes.numel(), "bits": weight.bits}
    return Compiled(
        library, weight.shape, weight.dtype, Layout.VECTORS, tensors,
        {"books": books, "d": d, "rows_per_table": weight.shape[0], **settings},
    )  # fmt: skip


def trellis(library: Library, weight: Trellis) -> Compiled | None:
    """Streams of digits as they are stored; None where a column does not consist of whole eights."""
    rows = weight.shape[0]
    if rows % 8:
        return None
    scale = torch.nn.functional.pad(weight.scale.flatten().expand(rows), (0, -rows % BLOCK))
    tensors = {
        "codes": torch.nn.functional.pad(weight.codes.flatten(), (0, 4)),
        "scale": scale,
        "table": window_values(weight.bits, weight.state_bits),
    }
    count, length = sequences_of(rows * weight.stripe)
    return Compiled(
        library, weight.shape, weight.dtype, Layout.TRELLIS, tensors,
        {
            "bits": weight.bits, "books": shortest(weight.bits, weight.state_bits), "d": weight.stripe,
            "rows_per_table": length, "count": count, "stride": weight.codes.shape[2],
        },
    )  # fmt: skip


def sparse(library: Library, weight: Sparse) -> Compiled | None:
    """Values with a bitmap or with their columns, as they are stored, and where rows start."""
    if weight.values.dtype not in FLOATS:
        return None
    if weight.bitmap is not None:
        counts = weight.survivors().sum(1)
    else:
        assert weight.counts is not None
        counts = weight.counts
    tensors = {"values": weight.values, "starts": _starts(counts)}
    if weight.bitmap is not None:
        settings = {"stride": weight.bitmap.shape[1], "count": weight.values.numel()}
        return Compiled(
            library, weight.shape, weight.dtype, Layout.BITMAP, {**tensors, "codes": weight.bitmap}, settings
        )
    assert weight.columns is not None
    return Compiled(library, weight.shape, weight.dtype, Layout.INDEXED, {**tensors, "index": weight.columns}, {})


def binary(library: Library, weight: Binary) -> Compiled | None:
    """One plane of signs, with scales by groups alone."""
    whole_groups = weight.shape[1] == weight.scale.shape[1] * weight.group_size or weight.scale.shape[1] == 1
    if weight.residual is not None or weight.columns is not None or weight.salient is not None or not whole_groups:
        return None
    table = torch.tensor([-1.0, 1.0]).repeat(8)
    return _panels(library, weight, Layout.TABLE, weight.signs, weight.scale, None, bits=1, table=table)


def two_level_int(library: Library, weight: TwoLevelInt) -> Compiled | None:
    """Integers whose scales are worked out once: in float32, since 16 bits would not hold them exactly."""
    grid = weight.grid()
    return _panels(library, weight, Layout.INTS, weight.codes, grid.scale, grid.zero, bits=weight.bits)


def sparse_int(library: Library, weight: SparseInt) -> Compiled | None:
    """Few entries: their values in float32, with their columns."""
    if weight.count > weight.shape[0] * weight.shape[1] * _FEW:
        return None
    survivors, matrix = weight.survivors(), weight.unpack(torch.float32)
    small = torch.int16 if weight.shape[1] <= 1 << 15 else torch.int32
    counts, columns, values = survivors.sum(1), survivors.nonzero()[:, 1].to(small), matrix[survivors]
    tensors = {"values": values, "starts": _starts(counts), "index": columns}
    return Compiled(library, weight.shape, weight.dtype, Layout.INDEXED, tensors, {})


def _panels(
    library: Library,
    weight: Weight,
    layout: Layout,
    codes: UInt8[Tensor, "out bytes"],
    scale: Tensor,
    zero: Tensor | None,
    table: Tensor | None = None,
    **settings: int,
) -> Compiled | None:
    """Codes, scales and zero points of 16 rows side by side; None where groups do not consist of whole eights."""
    out, cols = weight.shape
    groups = scale.shape[1]
    size = -(-cols // groups) if groups > 1 else cols
    if groups > 1 and (size % _SUBUNIT or size * groups != cols):
        return None
    words = _filled(codes, 4 * settings["bits"] * -(-cols // _UNIT)).view(torch.int32)
    tensors = {"codes": _side_by_side(words), "scale": _side_by_side(scale.expand(out, groups))}
    if zero is not None:
        tensors["zero"] = _side_by_side(zero.expand(out, groups))
    if table is not None:
        tensors["table"] = table
    return Compiled(
        library, weight.shape, weight.dtype, layout, tensors, {"groups": groups, "group_size": size, **settings}
    )


def _starts(counts: Tensor) -> Tensor:
    """Where each row's values begin, and where the last row's end."""
    return torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int64), (1, 0))


def _rows(
    library: Library, weight: Codebook, layout: Layout, codes: Tensor, table: Tensor, **settings: int
) -> Compiled:
    return Compiled(library, weight.shape, weight.dtype, layout, {"codes": codes, "table": table}, settings)


def _filled(codes: Tensor, width: int) -> Tensor:
    """Rows of bytes, filled up with zeros."""
    missing = width - codes.shape[1]
    return torch.nn.functional.pad(codes, (0, missing)) if missing else codes.contiguous()


def _side_by_side(rows: Tensor) -> Tensor:
    """[rows, n] as [rows / 16, n, 16], the last panel filled up with zeros."""
    missing = -rows.shape[0] % BLOCK
    if missing:
        rows = torch.cat([rows, rows.new_zeros(missing, rows.shape[1])])
    return rows.reshape(-1, BLOCK, rows.shape[1]).transpose(1, 2).contiguous()

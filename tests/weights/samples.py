"""One weight of every kind and of every nesting that methods make, over small random matrices."""

from dataclasses import replace
from typing import Any

import torch

from decoct.ops.float_grid import encode_packed, fit_float_grid
from decoct.ops.grid import fit_grid, quantize
from decoct.ops.input_grid import InputGrid, fixed_scale
from decoct.ops.two_level import fit_two_level
from decoct.weights import (
    Additive,
    Binary,
    Codebook,
    Columns,
    Dense,
    FloatBlock,
    GroupInt,
    LowRank,
    Masked,
    Padded,
    Plane,
    QuantizedInput,
    Rotated,
    Shared,
    Sparse,
    SparseInt,
    Stacked,
    Sum,
    Ternary,
    Trellis,
    TwoLevelInt,
    Weight,
    scale_index,
)
from decoct.weights.trellis import sequences_of
from tests.reference.inputs import gaussian

OUT, IN, RANK = 12, 24, 8


def mask(rows: int = OUT, cols: int = IN, keep: float = 0.5, seed: int = 9) -> torch.Tensor:
    return torch.rand(rows, cols, generator=torch.Generator().manual_seed(seed)) < keep


def dense(rows: int = OUT, cols: int = IN, seed: int = 0, dtype: torch.dtype = torch.float32) -> Dense:
    return Dense.of(gaussian(rows, cols, seed=seed, dtype=dtype))


def group_int(
    rows: int = OUT,
    cols: int = IN,
    bits: int = 4,
    group_size: int | str = 8,
    symmetric: bool = True,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> GroupInt:
    w = gaussian(rows, cols, seed=seed)
    grid = fit_grid(w, bits=bits, group_size=group_size, symmetric=symmetric)
    return GroupInt.of(quantize(w, grid), grid, dtype)


def real_zeros(group_size: int | str = 8, bits: int = 3, dtype: torch.dtype = torch.float32) -> GroupInt:
    """Zero points between the codes, and some beyond them."""
    w = gaussian(OUT, IN)
    grid = fit_grid(w, bits=bits, group_size=group_size, symmetric=False)
    assert grid.zero is not None
    shift = gaussian(*grid.zero.shape, seed=7).half()
    grid = replace(grid, zero=grid.zero.half() + shift)
    return GroupInt.of(quantize(w, grid), grid, dtype)


def float_block(
    element: str = "e2m1",
    scale_kind: str = "e8m0",
    block_size: int | str = 8,
    rows: int = OUT,
    cols: int = IN,
    dtype: torch.dtype = torch.float32,
) -> FloatBlock:
    w = gaussian(rows, cols, seed=3)
    grid = fit_float_grid(w, element=element, scale_kind=scale_kind, block_size=block_size)
    return FloatBlock.of_packed(encode_packed(w, grid), (rows, cols), grid, dtype)


def sparse(keep: float = 0.5, dtype: torch.dtype = torch.float32) -> Sparse:
    return Sparse.of(gaussian(OUT, IN, seed=4, dtype=dtype), mask(keep=keep))


def plane(rows: int, cols: int, groups: int, seed: int, dtype: torch.dtype) -> Plane:
    scale = gaussian(rows, groups, seed=seed + 1).abs() + 0.1
    return Plane(gaussian(rows, cols, seed=seed) >= 0, scale.to(dtype))


def binary(
    rows: int = OUT,
    cols: int = IN,
    *,
    group_size: int = IN,
    residual: bool = False,
    columns: bool = False,
    salient: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Binary:
    second = mask(1, cols, 0.3, seed=16)[0] if salient else None
    groups = int(scale_index(cols, group_size, second).max()) + 1
    return Binary.of(
        plane(rows, cols, groups, 11, dtype),
        group_size,
        dtype,
        residual=plane(rows, cols, groups, 13, dtype) if residual else None,
        columns=gaussian(cols, seed=15).abs().add(0.1).to(dtype) if columns else None,
        salient=second,
    )


def ternary(
    rows: int = OUT, cols: int = IN, group_size: int = 8, scales: int = OUT, dtype: torch.dtype = torch.float32
) -> Ternary:
    trits = torch.randint(-1, 2, (rows, cols), generator=torch.Generator().manual_seed(17), dtype=torch.int8)
    return Ternary.of(trits, (gaussian(scales, cols // group_size, seed=18).abs() + 0.1).to(dtype), group_size, dtype)


def sparse_int(
    keep: float, bits: int = 4, groups: int = 3, rows: int = OUT, cols: int = IN, dtype: torch.dtype = torch.float32
) -> SparseInt:
    codes = torch.randint(0, 2**bits, (rows, cols), generator=torch.Generator().manual_seed(19), dtype=torch.uint8)
    scale = (gaussian(rows, groups, seed=20).abs() + 0.1).to(dtype)
    return SparseInt.of(codes, mask(rows, cols, keep, seed=21), scale, bits, dtype)


def low_rank(dtype: torch.dtype = torch.float32) -> LowRank:
    return LowRank.of(dense(OUT, RANK, 1, dtype), dense(RANK, IN, 2, dtype))


def two_level_int(
    rows: int = OUT,
    cols: int = IN,
    bits: int = 4,
    scale_bits: int = 3,
    rows_per_block: int = 5,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> TwoLevelInt:
    w = gaussian(rows, cols, seed=seed) * gaussian(rows, 1, seed=seed + 1)
    grid, scales = fit_two_level(
        w, torch.ones_like(w, dtype=torch.bool), torch.ones(cols), bits=bits, group_size=8, scale_bits=scale_bits,
        rows_per_block=rows_per_block, scale_dtype=torch.bfloat16,
    )  # fmt: skip
    return TwoLevelInt.of(quantize(w, grid), grid, scales, dtype)


def codebook(
    rows: int = OUT,
    cols: int = IN,
    bits: int = 3,
    d: int = 1,
    tables: int = OUT,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Codebook:
    codes = torch.randint(0, 2**bits, (rows, cols // d), generator=torch.Generator().manual_seed(seed))
    table = gaussian(tables, 2**bits, d, seed=seed + 1, dtype=torch.bfloat16)
    return Codebook.of(codes.to(torch.uint8), table, dtype)


def additive(
    rows: int = OUT,
    cols: int = IN,
    books: int = 2,
    bits: int = 3,
    d: int = 4,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Additive:
    codes = torch.randint(0, 2**bits, (books, rows, cols // d), generator=torch.Generator().manual_seed(seed))
    stored = torch.float16 if dtype == torch.float16 else torch.bfloat16
    codebooks = gaussian(books, 2**bits, d, seed=seed + 1, dtype=stored)
    return Additive.of(codes.to(torch.uint8), codebooks, gaussian(rows, 1, seed=seed + 2).abs().to(stored), dtype)


def columns(index: tuple[int, ...] = (3, 0, 17), dtype: torch.dtype = torch.float32) -> Columns:
    values = gaussian(OUT, len(index), seed=3, dtype=torch.bfloat16)
    return Columns.of(values, torch.tensor(index, dtype=torch.long), IN, dtype)


def trellis(
    rows: int = OUT,
    cols: int = IN,
    bits: int = 2,
    stripe: int = 4,
    each_row: bool = False,
    seed: int = 3,
    dtype: torch.dtype = torch.float32,
) -> Trellis:
    generator = torch.Generator().manual_seed(seed)
    shape = (-(-cols // stripe), *sequences_of(rows * stripe))
    digits = torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.uint8)
    scale = 0.5 + torch.rand(rows if each_row else 1, 1, generator=generator)
    return Trellis.of(digits, (rows, cols), scale.to(dtype), dtype, bits=bits, state_bits=10, stripe=stripe)


def rotated(inner: Weight) -> Rotated:
    left, right = gaussian(inner.shape[0], seed=6), gaussian(inner.shape[1], seed=7)
    return Rotated.of(inner, left.to(inner.dtype), right.to(inner.dtype))


def quantized_input(inner: Weight, form: str = "int", kept: tuple[int, ...] = (), **changes: Any) -> QuantizedInput:
    grid = InputGrid(form, **changes)
    scale = fixed_scale(grid, 2.0) if grid.needs_scale else None
    return QuantizedInput.of(inner, grid, scale, torch.tensor(kept) if kept else None)


def rotated_inputs(inner: Weight) -> Rotated:
    return Rotated.of(inner, None, gaussian(inner.shape[1], seed=7).to(inner.dtype))


def samples() -> dict[str, Weight]:  # noqa: C901 - a list
    """By a name for the test's id."""
    half = torch.bfloat16
    found: dict[str, Weight] = {
        "dense": dense(),
        "dense-bf16": dense(dtype=half),
        "sparse-bitmap": sparse(),
        "sparse-columns-bf16": sparse(0.03, half),
        "sparse-empty": sparse(0.0),
        "sparse-full": sparse(1.0),
        "padded(dense)": Padded.of(dense(OUT - 4, IN), (OUT, IN)),
        "padded(int)": Padded.of(group_int(OUT, IN - 8), (OUT, IN)),
        "masked-dense": Masked.of(dense(), mask()),
        "low_rank-bf16": low_rank(half),
        "shared": Shared.of("model.embed_tokens.weight", dense()),
        "low_rank(int,int)": LowRank.of(
            group_int(OUT, RANK, 8, seed=1, dtype=half), group_int(RANK, IN, 3, symmetric=False, seed=2, dtype=half)
        ),
        "sum(int,low_rank)": Sum.of(group_int(bits=3), low_rank()),
        "sum(int,sparse)": Sum.of(group_int(bits=3), sparse(0.03)),
        "sum(int,sparse,low_rank)-bf16": Sum.of(group_int(dtype=half), sparse(0.2, half), low_rank(half)),
        "sum(masked(int),low_rank(int,int))": Sum.of(
            Masked.of(group_int(), mask()), LowRank.of(group_int(OUT, RANK, seed=1), group_int(RANK, IN, seed=2))
        ),
        "masked(int)": Masked.of(group_int(symmetric=False, dtype=half), mask()),
        "binary": binary(),
        "binary-8-bf16": binary(group_size=8, dtype=half),
        "binary-ragged-residual": binary(group_size=10, residual=True),
        "binary-salient-residual-bf16": binary(group_size=10, residual=True, salient=True, dtype=half),
        "binary-columns": binary(columns=True),
        "binary-everything": binary(group_size=7, residual=True, columns=True, salient=True),
        "binary-one-row": binary(1, IN, group_size=8),
        "ternary": ternary(),
        "ternary-channel-bf16": ternary(group_size=IN, dtype=half),
        "ternary-tensor": ternary(group_size=IN, scales=1),
        "ternary-one-row": ternary(1, IN, 8, 1),
        "sparse_int-gaps": sparse_int(0.1),
        "sparse_int-bitmap-bf16": sparse_int(0.6, 8, 1, dtype=half),
        "sparse_int-empty": sparse_int(0.0),
        "sparse_int-full": sparse_int(1.0, 3),
        "sum(binary,sparse_int)": Sum.of(binary(group_size=8), sparse_int(0.1, 8, 1)),
        "masked(ternary)": Masked.of(ternary(), mask()),
        "low_rank(binary,ternary)": LowRank.of(binary(OUT, RANK, group_size=RANK), ternary(RANK, IN, 8, RANK)),
        "trellis-rows": trellis(each_row=True),
        "trellis-one-row": trellis(1, 7, 3),
        "rotated(trellis)": rotated(trellis()),
        "rotated(trellis)-bf16": rotated(trellis(13, 20, dtype=half)),
        "rotated(dense)": rotated(dense(OUT, 20)),
        "rotated-inputs(dense)": rotated_inputs(dense(OUT, 20)),
        "rotated-inputs(group_int)-bf16": rotated_inputs(group_int(dtype=half)),
        "rotated-outputs(dense)": Rotated.of(dense(OUT, 20), gaussian(OUT, seed=6), None),
        "sum(rotated(trellis),low_rank)": Sum.of(rotated(trellis()), low_rank()),
        "inputs(dense)-bf16": quantized_input(dense(dtype=half), bits=4, clip_ratio=0.9),
        "inputs(int8)": quantized_input(group_int(bits=8, group_size="channel")),
        "inputs(int4-tensor)": quantized_input(group_int(bits=4, group_size="tensor"), bits=6, group_size="tensor"),
        "inputs(int4)": quantized_input(group_int(), symmetric=False, group_size=8),
        "inputs(masked(int))": quantized_input(Masked.of(group_int(), mask())),
        "inputs-fp8(e4m3)": quantized_input(float_block("e4m3", "real", "channel"), "fp8"),
        "inputs-fp8-tensor(e4m3)": quantized_input(float_block("e4m3", "real", "tensor"), "fp8", group_size="tensor"),
        "inputs-mxfp4(e2m1)": quantized_input(float_block(), "mxfp4", group_size=8),
        "inputs-nvfp4(e2m1)": quantized_input(float_block("e2m1", "e4m3"), "nvfp4", group_size=8),
        "inputs(codebook)": quantized_input(codebook()),
        "inputs(sum(int,low_rank))": quantized_input(Sum.of(group_int(bits=3), low_rank())),
        "sum(inputs(int),columns)": Sum.of(
            quantized_input(group_int(bits=8, group_size="channel"), kept=(3, 0, 17)), columns()
        ),
        "sum(inputs(int),low_rank)": Sum.of(quantized_input(group_int(bits=3)), low_rank()),
        "low_rank(inputs(int),inputs(int))": LowRank.of(
            quantized_input(group_int(OUT, RANK, seed=1)), quantized_input(group_int(RANK, IN, seed=2), bits=6)
        ),
        "stacked(int,codebook)": Stacked.of(group_int(5), codebook(bits=3)),
        "stacked(masked(int),sum(int,columns))-bf16": Stacked.of(
            Masked.of(group_int(dtype=half), mask()), Sum.of(group_int(dtype=half), columns(dtype=half))
        ),
        "stacked(rotated(trellis),rotated(trellis))": Stacked.of(rotated(trellis(8, 20)), rotated(trellis(5, 20))),
        "stacked(inputs(int),int)": Stacked.of(quantized_input(group_int()), group_int(7)),
        "rotated(inputs(trellis))": rotated(quantized_input(trellis(), bits=4)),
        "one-row": group_int(1, IN, 3, symmetric=False),
    }
    for bits in range(2, 9):
        found[f"int{bits}-8-asym"] = group_int(bits=bits, symmetric=False)
    for bits in range(1, 5):
        found[f"trellis{bits}"] = trellis(bits=bits, stripe=bits + 2)
    for bits in (3, 4):
        for size in (8, "channel", "tensor"):
            found[f"int{bits}-{size}-sym"] = group_int(bits=bits, group_size=size)
    found["int3-channel-asym"] = group_int(bits=3, group_size="channel", symmetric=False)
    found["int3-tensor-asym"] = group_int(bits=3, group_size="tensor", symmetric=False)
    for bits in range(1, 9):
        found[f"codebook{bits}"] = codebook(bits=bits)
    for d in range(1, 9):
        found[f"codebook5-d{d}"] = codebook(OUT, IN // d * d, bits=5, d=d)
    for tables in (1, 3, 4):
        found[f"codebook4-{tables}-tables"] = codebook(bits=4, tables=tables)
    found["codebook4-last-table-shorter"] = codebook(14, IN, bits=4, tables=4, d=2, dtype=half)
    found["masked(codebook)"] = Masked.of(codebook(dtype=half), mask())
    found["sum(codebook,sparse)"] = Sum.of(codebook(), sparse(0.03))
    for books, bits, d in ((1, 8, 8), (2, 8, 8), (3, 5, 6), (4, 1, 1), (1, 3, 24)):
        found[f"additive-{books}x{bits}-d{d}"] = additive(books=books, bits=bits, d=d)
    found["additive-bf16"] = additive(dtype=half)
    found["additive-one-row"] = additive(1, 8)
    found["low_rank(additive,additive)"] = LowRank.of(additive(OUT, RANK), additive(RANK, IN))
    found["inputs(additive)"] = quantized_input(additive(), bits=4)
    found["stacked(additive,additive)"] = Stacked.of(additive(5), additive(OUT - 5, seed=5))
    found["columns"] = columns()
    found["columns-none"] = columns(())
    found["sum(int,columns)-bf16"] = Sum.of(group_int(dtype=half), columns(dtype=half))
    found["sum(two_level,sparse)"] = Sum.of(two_level_int(), sparse(0.03))
    for bits in (2, 3, 8):
        found[f"two_level{bits}"] = two_level_int(bits=bits)
    for scale_bits, rows in ((1, 1), (4, 16), (8, 12)):
        found[f"two_level4-scales{scale_bits}-block{rows}"] = two_level_int(
            scale_bits=scale_bits, rows_per_block=rows, dtype=half
        )
    found["two_level-one-row"] = two_level_int(1)
    for size in (8, "channel", "tensor"):
        found[f"int3-{size}-real"] = real_zeros(size)
        found[f"fp8-{size}"] = float_block("e4m3", "real", size)
    found["masked(int-real)-bf16"] = Masked.of(real_zeros(bits=4, dtype=half), mask())
    for element in ("e2m1", "e2m3", "e3m2", "e4m3"):
        found[f"{element}-e8m0"] = float_block(element)
    found["e2m1-e4m3"] = float_block("e2m1", "e4m3")
    found["e2m1-e4m3-channel-bf16"] = float_block("e2m1", "e4m3", "channel", dtype=half)
    found["masked(e2m1)"] = Masked.of(float_block(), mask())
    found["low_rank(e4m3,e2m1)"] = LowRank.of(
        float_block("e4m3", "real", "channel", OUT, RANK), float_block("e2m1", "e4m3", 8, RANK, IN)
    )
    return found

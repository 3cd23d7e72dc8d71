"""One weight of every kind and of every nesting that methods make, over small random matrices."""

import torch

from decoct.ops.grid import fit_grid, quantize
from decoct.ops.two_level import fit_two_level
from decoct.weights import (
    Codebook,
    Columns,
    Dense,
    GroupInt,
    LowRank,
    Masked,
    Shared,
    Sparse,
    Sum,
    TwoLevelInt,
    Weight,
)
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


def sparse(keep: float = 0.5, dtype: torch.dtype = torch.float32) -> Sparse:
    return Sparse.of(gaussian(OUT, IN, seed=4, dtype=dtype), mask(keep=keep))


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


def columns(index: tuple[int, ...] = (3, 0, 17), dtype: torch.dtype = torch.float32) -> Columns:
    values = gaussian(OUT, len(index), seed=3, dtype=torch.bfloat16)
    return Columns.of(values, torch.tensor(index, dtype=torch.long), IN, dtype)


def samples() -> dict[str, Weight]:
    """By a name for the test's id."""
    half = torch.bfloat16
    found: dict[str, Weight] = {
        "dense": dense(),
        "dense-bf16": dense(dtype=half),
        "sparse-bitmap": sparse(),
        "sparse-columns-bf16": sparse(0.03, half),
        "sparse-empty": sparse(0.0),
        "sparse-full": sparse(1.0),
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
        "one-row": group_int(1, IN, 3, symmetric=False),
    }
    for bits in range(2, 9):
        found[f"int{bits}-8-asym"] = group_int(bits=bits, symmetric=False)
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
    return found

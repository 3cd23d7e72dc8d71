"""One weight of every kind and of every nesting that methods make, over small random matrices."""

from dataclasses import replace

import torch

from decoct.ops.float_grid import encode_packed, fit_float_grid
from decoct.ops.grid import fit_grid, quantize
from decoct.weights import Dense, FloatBlock, GroupInt, LowRank, Masked, Shared, Sparse, Sum, Weight
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


def low_rank(dtype: torch.dtype = torch.float32) -> LowRank:
    return LowRank.of(dense(OUT, RANK, 1, dtype), dense(RANK, IN, 2, dtype))


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

"""One weight of every kind and of every nesting that methods make, over small random matrices."""

import torch

from decoct.ops.grid import fit_grid, quantize
from decoct.weights import Dense, GroupInt, LowRank, Masked, Rotated, Shared, Sparse, Sum, Trellis, Weight
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


def sparse(keep: float = 0.5, dtype: torch.dtype = torch.float32) -> Sparse:
    return Sparse.of(gaussian(OUT, IN, seed=4, dtype=dtype), mask(keep=keep))


def low_rank(dtype: torch.dtype = torch.float32) -> LowRank:
    return LowRank.of(dense(OUT, RANK, 1, dtype), dense(RANK, IN, 2, dtype))


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
        "trellis-rows": trellis(each_row=True),
        "trellis-one-row": trellis(1, 7, 3),
        "rotated(trellis)": rotated(trellis()),
        "rotated(trellis)-bf16": rotated(trellis(13, 20, dtype=half)),
        "rotated(dense)": rotated(dense(OUT, 20)),
        "sum(rotated(trellis),low_rank)": Sum.of(rotated(trellis()), low_rank()),
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
    return found

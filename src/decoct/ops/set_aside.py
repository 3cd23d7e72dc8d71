"""Entries of a vector that stand out, kept in 16 bits beside a dense grid for the rest (as in arXiv 2401.18079)."""

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

_HALF = torch.finfo(torch.float16)
_BYTE = 1 << 8  # entries of a vector whose positions fit into a byte

MOST = 1 << 16
"""Entries that a vector may have: positions take two bytes at most."""


def set_aside(
    x: Float[Tensor, "*vectors groups n"], count: int
) -> tuple[dict[str, Tensor], Bool[Tensor, "*vectors groups n"]]:
    """The `count` entries of each vector that lie farthest from the mean of their group.

    As many in every vector, so that no counts have to be stored; which groups they come from is free.

    Args:
        x: float32; a vector is all of the last two axes, up to 65536 entries.
        count: at least 1.

    Returns:
        ({"outliers": float16 [*vectors, count], clamped to what float16 holds, "positions": of these in the vector,
        uint8 or, in vectors of more than 256 entries, int16 with the bits of an unsigned number}, where they are).
    """
    distance = (x - x.mean(-1, keepdim=True)).abs_().flatten(-2)
    positions = distance.topk(count, dim=-1).indices
    values = x.flatten(-2).gather(-1, positions).clamp(_HALF.min, _HALF.max).to(torch.float16)
    where = torch.zeros_like(distance, dtype=torch.bool).scatter_(-1, positions, value=True).reshape(x.shape)
    return {"outliers": values, "positions": _short(positions, distance.shape[-1])}, where


def put_back(x: Float[Tensor, "*vectors a b"], kept: dict[str, Tensor]) -> Float[Tensor, "*vectors a b"]:
    """x, float32, with the entries that `set_aside` kept; as it is if there are none."""
    if "outliers" not in kept:
        return x
    flat = x.flatten(-2).scatter(-1, _long(kept["positions"]), kept["outliers"].float())
    return flat.reshape(x.shape)


def _short(positions: Tensor, size: int) -> Shaped[Tensor, "*vectors count"]:
    return positions.to(torch.uint8) if size <= _BYTE else (positions - (positions >= MOST // 2) * MOST).to(torch.int16)


def _long(positions: Shaped[Tensor, "*vectors count"]) -> Tensor:
    return positions.long() % MOST

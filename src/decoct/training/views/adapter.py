"""Low-rank terms beside frozen matrices: LoRA (arXiv 2106.09685, on rounded ones QLoRA's, 2305.14314) and QA-LoRA's."""

import math
import zlib

import torch
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from decoct.ops.grid import Grid
from decoct.ops.packing import unpack_bits
from decoct.training.views.leaf import Leaf
from decoct.training.views.vector import rounded
from decoct.training.views.view import View
from decoct.weights import Dense, GroupInt, LowRank, Sum, Weight


def with_lora(weight: Weight, rank: int, seed: int, name: str) -> tuple[Sum, tuple[str]]:
    """A weight as it is, and beside it a product of two thin matrices, zero at first; and how names in that begin.

    It reads the inputs as they come, also where the weight rounds them.

    Args:
        weight: stays.
        rank: of the product; no more than the weight has.
        seed: of what starts at random.
        name: the slot's; each has another start.
    """
    rank = min(rank, *weight.shape)
    left = torch.zeros(weight.shape[0], rank, dtype=weight.dtype)
    term = LowRank.of(Dense.of(left), Dense.of(_start(rank, weight.shape[1], seed, name).to(weight.dtype)))
    terms = weight.terms if isinstance(weight, Sum) else (weight,)
    return Sum.of(*terms, term), (f"terms.{len(terms)}.",)


def qa_lora_view(weight: Weight, rank: int, seed: int, name: str) -> View:
    """A weight whose integers stay, and whose zero points move by a low-rank matrix; other weights are left alone."""
    leaves: dict[str, Leaf] = {}
    for path, node in _with_paths(weight):
        if isinstance(node, GroupInt) and node.scale.shape[0] == node.shape[0]:
            leaves[path] = ZeroPointLeaf(node, min(rank, *node.scale.shape), seed, f"{name}/{path}")
    return View(weight, leaves, chosen=lambda _: False)


class ZeroPointLeaf(Leaf):
    """QA-LoRA (arXiv 2309.14717): one low-rank entry for each row and group, which ends in the group's zero point.

    So nothing is added to the matrix when training is over; zero points become 16-bit numbers.
    """

    def __init__(self, weight: GroupInt, rank: int, seed: int, name: str) -> None:
        """Begin with a quantized matrix as it is."""
        super().__init__()
        self._was, grid = weight, weight.grid()
        symmetric = torch.full_like(grid.scale, 2 ** (weight.bits - 1), dtype=torch.float32)
        self._zero = symmetric if grid.zero is None else grid.zero.float()
        out, groups = grid.scale.shape
        self.left = nn.Parameter(torch.zeros(out, rank))
        self.right = nn.Parameter(_start(rank, groups, seed, name))

    @override
    def matrix(self) -> Float[Tensor, "out in"]:
        was, scale = self._was, self._was.scale.float()
        codes = unpack_bits(was.codes, was.bits, was.shape[1]).reshape(*scale.shape, -1)
        moved: Tensor = (codes - self._zeros().unsqueeze(-1)) * scale.unsqueeze(-1)
        return moved.reshape(was.shape)

    @override
    def units(self) -> dict[str, float]:
        # In steps of the grid: a product of ones would move each zero point by a whole step.
        size = float(self.left.shape[1]) ** -0.5
        return {"left": size, "right": size}

    @override
    @torch.no_grad()
    def weight(self) -> Weight:
        was, grid = self._was, self._was.grid()
        zero = self._zeros().to(grid.scale.dtype)
        return GroupInt.of_packed(was.codes, was.shape, Grid(grid.scale, zero, was.bits, was.group_size), was.dtype)

    def _zeros(self) -> Tensor:
        return rounded(self._zero - self.left @ self.right, self._was.scale.dtype)


def _start(rank: int, columns: int, seed: int, name: str) -> Float[Tensor, "rank columns"]:
    """Random numbers that keep lengths; another draw for each name."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + zlib.crc32(name.encode()))
    return torch.randn(rank, columns, generator=generator) / math.sqrt(columns)


def _with_paths(weight: Weight, path: str = "") -> list[tuple[str, Weight]]:
    """This weight and all nested ones, by path."""
    found = [(path, weight)]
    for name, child in weight.children().items():
        found += _with_paths(child, f"{path}.{name}" if path else name)
    return found

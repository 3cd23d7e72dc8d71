"""Latent weights: a matrix in full precision behind one that is rounded (quantization-aware training)."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from decoct.methods.quantize.qat import QAT
from decoct.ops.grid import Grid, resolve_group_size, stored_scale_dtype
from decoct.ops.levels import fit_step, level_codes, round_to_levels
from decoct.training.views.leaf import Leaf
from decoct.training.views.size import typical_size
from decoct.training.views.vector import rounded
from decoct.training.views.view import View
from decoct.weights import Binary, Dense, GroupInt, Masked, Plane, Sparse, Ternary, Weight


@dataclass(frozen=True, slots=True)
class Levels:
    """What a leaf rounds to.

    Attributes:
        count: levels.
        zero: the one that stands for 0, counted from 0; may lie between two.
        wide: see `round_to_levels`.
        group_size: columns that share a step.
    """

    count: int
    zero: float
    wide: bool
    group_size: int

    @property
    def stored_zero(self) -> bool:
        """Whether the zero point has to be stored: it is not where symmetric integers have it."""
        return self.count > 3 and self.zero != self.count // 2


class LevelsLeaf(Leaf):
    """Latent weights, and a learned step for each group, float32."""

    def __init__(
        self, latent: Float[Tensor, "out in"], step: Float[Tensor, "out groups"], levels: Levels, dtype: torch.dtype
    ) -> None:
        """Begin with these; `step` is in the dtype that it is stored in, `dtype` is that of the matrix.

        A negative step (see `ops/grid.py`) keeps its sign; its size is learned.
        """
        super().__init__()
        self._levels, self._dtype, self._stored = levels, dtype, step.dtype
        self._sign = None if bool((step > 0).all()) else step.float().sign()
        self.latent, self.step = nn.Parameter(latent.float().clone()), nn.Parameter(step.float().abs())

    @override
    def matrix(self) -> Float[Tensor, "out in"]:
        levels = self._levels
        turned = self._turned(self.latent)
        return self._turned(round_to_levels(turned, self._steps(), levels.zero, levels.count, wide=levels.wide))

    @override
    def units(self) -> dict[str, float]:
        return {"latent": typical_size(self.latent.detach()), "step": typical_size(self.step.detach())}

    @override
    @torch.no_grad()
    def weight(self) -> Weight:
        levels, step = self._levels, self._steps()
        codes = level_codes(self._turned(self.latent), step, levels.zero, levels.count)
        stored = (step if self._sign is None else step * self._sign).to(self._stored)
        if levels.count == 2:
            return Binary.of(Plane(codes > 0, stored / 2), levels.group_size, self._dtype)
        if levels.count == 3:
            return Ternary.of(codes.to(torch.int8) - 1, stored, levels.group_size, self._dtype)
        zero = torch.full_like(stored, levels.zero) if levels.stored_zero else None
        bits = (levels.count - 1).bit_length()
        return GroupInt.of(codes, Grid(stored, zero, bits, levels.group_size), self._dtype)

    def _turned(self, matrix: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """With the other sign where the step is negative."""
        return matrix if self._sign is None else matrix * self._sign.repeat_interleave(self._levels.group_size, 1)

    def _steps(self) -> Tensor:
        """Their sizes as they would be stored: positive, rounded."""
        least = torch.finfo(self._stored).smallest_normal * 2  # a binary weight stores half of it
        return rounded(self.step.clamp(min=least), self._stored)


class AbsmeanLeaf(LevelsLeaf):
    """Latent weights whose step is the mean of their sizes (BitNet b1.58, arXiv 2402.17764)."""

    def __init__(self, latent: Tensor, levels: Levels, dtype: torch.dtype) -> None:
        """Begin with these weights."""
        groups = latent.shape[1] // levels.group_size
        unused = torch.ones(latent.shape[0], groups, dtype=stored_scale_dtype(dtype))
        super().__init__(latent, unused, levels, dtype)
        del self.step

    @override
    def units(self) -> dict[str, float]:
        return {"latent": typical_size(self.latent.detach())}

    @override
    def matrix(self) -> Float[Tensor, "out in"]:
        # The rounded weights, with the latent ones' gradient: nothing is clipped, and the mean is no variable.
        levels = self._levels
        with torch.no_grad():
            found = round_to_levels(self.latent, self._steps(), levels.zero, levels.count, wide=True)
        return self.latent + (found - self.latent).detach()

    @override
    def _steps(self) -> Tensor:
        sizes = self.latent.detach().reshape(self.latent.shape[0], -1, self._levels.group_size).abs().mean(-1)
        least = torch.finfo(self._stored).smallest_normal * 2
        return sizes.clamp(min=least).to(self._stored).float()


class ZeroedLeaf(Leaf):
    """Latent weights on a grid whose zero points, one a group, are stored numbers already; they stay."""

    def __init__(self, weight: GroupInt) -> None:
        """Begin with a quantized matrix, at its codes."""
        super().__init__()
        grid = weight.grid()
        assert grid.zero is not None
        self._was, self._zero = weight, grid.zero.float()
        self.latent, self.step = nn.Parameter(weight.unpack(torch.float32)), nn.Parameter(grid.scale.float())

    @override
    def matrix(self) -> Float[Tensor, "out in"]:
        # A grid with the zero point z is one with level 0 at zero, of weights that are shifted by z steps.
        step, count = self._steps(), 2**self._was.bits
        shift = (self._zero * step).repeat_interleave(self._was.group_size, 1)
        return round_to_levels(self.latent + shift, step, 0.0, count, wide=False) - shift

    @override
    def units(self) -> dict[str, float]:
        return {"latent": typical_size(self.latent.detach()), "step": typical_size(self.step.detach())}

    @override
    @torch.no_grad()
    def weight(self) -> Weight:
        step, was = self._steps(), self._was
        shift = (self._zero * step).repeat_interleave(was.group_size, 1)
        codes = level_codes(self.latent + shift, step, 0.0, 2**was.bits)
        grid = was.grid()
        return GroupInt.of(codes, Grid(step.to(grid.scale.dtype), grid.zero, was.bits, was.group_size), was.dtype)

    def _steps(self) -> Tensor:
        stored = self._was.scale.dtype
        return rounded(self.step.clamp(min=torch.finfo(stored).smallest_normal), stored)


def latent_view(weight: Weight, method: QAT) -> View:
    """A view in which every matrix that can be rounded, inside a weight, has latent weights behind it.

    Raises:
        ValueError: the group size does not divide a matrix's columns.
    """
    if isinstance(weight, Sparse):
        weight = Masked.of(Dense.of(weight.unpack()), weight.survivors())
    leaves = {path: _leaf(node, method) for path, node in _nodes(weight)}
    inside = tuple(f"{path}." if path else "" for path in leaves)
    return View(weight, leaves, lambda name: not name.startswith(inside))


def _nodes(weight: Weight, path: str = "") -> Iterator[tuple[str, Weight]]:
    """The matrices inside a weight that get latent weights, by path."""
    if isinstance(weight, Dense | GroupInt | Ternary) or (isinstance(weight, Binary) and _plain(weight)):
        yield path, weight
    for name, child in weight.children().items():
        yield from _nodes(child, f"{path}.{name}" if path else name)


def _plain(weight: Binary) -> bool:
    """One plane with a scale a group, and nothing else."""
    whole = weight.scale.shape[1] * weight.group_size == weight.shape[1]
    return whole and weight.residual is None and weight.columns is None and weight.salient is None


def _leaf(weight: Weight, method: QAT) -> Leaf:
    if isinstance(weight, Dense):
        size = resolve_group_size(method.group_size, weight.shape[1])
        levels = Levels(method.levels, method.zero, method.wide, size)
        latent = weight.unpack(torch.float32)
        if method.grid == "absmean":
            return AbsmeanLeaf(latent, levels, weight.dtype)
        step = fit_step(latent, size, levels.zero, levels.count, stored_scale_dtype(weight.dtype))
        return LevelsLeaf(latent, step, levels, weight.dtype)
    latent = weight.unpack(torch.float32)
    if isinstance(weight, Ternary):
        return LevelsLeaf(latent, weight.scale, Levels(3, 1.0, True, weight.group_size), weight.dtype)
    if isinstance(weight, Binary):
        return LevelsLeaf(latent, weight.scale * 2, Levels(2, 0.5, True, weight.group_size), weight.dtype)
    assert isinstance(weight, GroupInt)
    if weight.zero is None:
        levels = Levels(2**weight.bits, 2 ** (weight.bits - 1), False, weight.group_size)
        return LevelsLeaf(latent, weight.scale, levels, weight.dtype)
    return ZeroedLeaf(weight)

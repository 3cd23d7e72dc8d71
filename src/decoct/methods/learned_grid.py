"""Grids of integer codes that are being learned, and where they stand in a weight that nests them."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor

from decoct.ops.grid import stored_scale
from decoct.ops.hadamard import hadamard
from decoct.ops.rounding import clipped_codes
from decoct.weights import Dense, GroupInt, LowRank, Masked, Padded, Rotated, Stacked, Sum, Weight, pull_back

NEAREST = 0.4  # codes that a weight lies from the code it starts with, at most: nearer to the edge, noise moves it


class Latent(ABC):
    """One grid of integer codes while it is learned: what is learned, and how weights follow from it."""

    @abstractmethod
    def values(self) -> Float[Tensor, "out in"]:
        """The weights as they would be stored now, float32."""

    @abstractmethod
    def move(self, gradient: Float[Tensor, "out in"], rate: float) -> None:
        """A step against the gradient of the loss by the weights, float32, at the rate of that step."""

    @abstractmethod
    def weight(self) -> GroupInt:
        """Packed."""


@dataclass(frozen=True, slots=True)
class Start:
    """A grid as learning finds it, float32, with dimensions (rows, groups, features of a group).

    A grid with one scale in all has one row and one group of scales.

    Attributes:
        weight: the grid.
        scale: what a code is multiplied by, [rows or 1, groups, 1].
        zero: zero points, of the same shape.
    """

    weight: GroupInt
    scale: Float[Tensor, "rows groups 1"]
    zero: Float[Tensor, "rows groups 1"]

    @classmethod
    def of(cls, weight: GroupInt) -> Self:
        """Unpack a grid with integer zero points."""
        grid = weight.grid()
        middle = torch.full_like(grid.scale, 2.0 ** (grid.bits - 1)) if grid.zero is None else grid.zero
        return cls(weight, grid.scale.float().unsqueeze(-1), middle.float().unsqueeze(-1))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Rows, groups, features of a group."""
        rows, cols = self.weight.shape
        return rows, cols // self.weight.group_size, self.weight.group_size

    def codes(self) -> Float[Tensor, "out groups size"]:
        """Counted from zero."""
        return self.weight.unpack_codes().reshape(self.shape) - self.zero

    def position(self, wanted: Float[Tensor, "out in"]) -> Float[Tensor, "out groups size"]:
        """Where weights lie among the codes, in codes: where they were before they were rounded, if possible.

        A weight that an earlier step gave another code than the nearest one (GPTQ does, to make up for errors
        elsewhere) starts near the edge of that code, so that every position rounds to the code that was found.
        """
        exact, codes = wanted.reshape(self.shape) / self.scale, self.codes()
        kept = clipped_codes(exact, *self.limits(self.zero)) == codes
        return torch.where(kept, exact, exact.clamp(codes - NEAREST, codes + NEAREST))

    def limits(self, zero: Float[Tensor, "rows groups 1"]) -> tuple[Tensor, Tensor]:
        """Least and greatest code, counted from such zero points."""
        return -zero, 2**self.weight.bits - 1 - zero

    def stored(self, scale: Float[Tensor, "rows groups 1"]) -> Float[Tensor, "rows groups 1"]:
        """Scales as they would be stored."""
        return stored_scale(scale, self.weight.scale.dtype)

    def packed(
        self,
        codes: Float[Tensor, "out groups size"],
        scale: Float[Tensor, "rows groups 1"],
        zero: Float[Tensor, "rows groups 1"],
    ) -> GroupInt:
        """The same kind of weight with other codes (counted from zero), scales (`stored`) and zero points."""
        grid = self.weight.grid()
        points = None if grid.zero is None else zero.squeeze(-1).to(torch.uint8)
        grid = replace(grid, scale=scale.squeeze(-1).to(grid.scale.dtype), zero=points)
        return GroupInt.of((codes + zero).to(torch.uint8).reshape(self.weight.shape), grid, self.weight.dtype)


@dataclass(frozen=True, slots=True)
class Learned:
    """One slot on its way: what it is made of, and the integer codes in it that are learned.

    Attributes:
        start: the weight as learning found it.
        latents: by where they stand in it, as `grids` names it.
    """

    start: Weight
    latents: dict[str, Latent]

    def unpack(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        """The matrix as it would be stored now."""
        return self._values().unpack(dtype)

    def move(self, gradient: Float[Tensor, "out in"], rate: float) -> None:
        """A step against the gradient of the loss by the matrix."""
        if "" in self.latents:  # the whole matrix is one grid
            self.latents[""].move(gradient.float(), rate)
            return
        pulled = pull_back(self._values(), gradient)
        for path, latent in self.latents.items():
            latent.move(pulled[f"{path}values"], rate)

    def weight(self) -> Weight:
        """Packed, in the structure that it had."""
        return _with(self.start, {path: latent.weight() for path, latent in self.latents.items()})

    def _values(self) -> Weight:
        """The same with the learned parts unpacked."""
        return _with(self.start, {path: Dense.of(latent.values()) for path, latent in self.latents.items()})


def grids(weight: Weight, path: str = "") -> dict[str, GroupInt]:
    """Every GroupInt with integer zero points in a weight, by where it stands: "", "inner.", "terms.0." and so on."""
    if isinstance(weight, GroupInt):
        real = weight.zero is not None and weight.zero.is_floating_point()
        return {} if real else {path: weight}
    found: dict[str, GroupInt] = {}
    for name, child in weight.children().items():
        found.update(grids(child, f"{path}{name}."))
    return found


def _with(weight: Weight, parts: Mapping[str, Weight], path: str = "") -> Weight:
    """A weight with other parts where `grids` found some."""
    if path in parts:
        return parts[path]
    children = {name: _with(child, parts, f"{path}{name}.") for name, child in weight.children().items()}
    return weight.with_children(children) if children else weight


def goals(
    weight: Weight, before: Weight, wanted: Float[Tensor, "out in"], path: str = ""
) -> dict[str, Float[Tensor, "out in"]]:
    """What each of a weight's grids should hold so that the whole comes closest to `wanted`, by the names of `grids`.

    A factor of a product has no such goal by itself: it should stay what it was before it was rounded, where that is
    known.
    """
    match weight:
        case GroupInt():
            return {path: wanted}
        case Masked(inner=inner):
            below = before.inner if isinstance(before, Masked) else before
            return goals(inner, below, wanted * weight.survivors(), f"{path}inner.")
        case Padded(inner=inner):
            below = before.inner if isinstance(before, Padded) else before
            return goals(inner, below, wanted[: inner.shape[0], : inner.shape[1]], f"{path}inner.")
        case Rotated(inner=inner, left=None, right=right) if right is not None:
            below = before.inner if isinstance(before, Rotated) else before
            return goals(inner, below, hadamard(wanted / right.float()), f"{path}inner.")
        case Sum(terms=terms):
            values = [term.unpack(torch.float32) for term in terms]
            found: dict[str, Tensor] = {}
            for number, term in enumerate(terms):
                others = sum(values[:number] + values[number + 1 :], torch.zeros(()))
                found.update(goals(term, term, wanted - others, f"{path}terms.{number}."))
            return found
        case Stacked(parts=parts):
            pairs = enumerate(zip(parts, weight.split(wanted), strict=True))
            of_parts = (goals(part, part, rows, f"{path}parts.{n}.") for n, (part, rows) in pairs)
            return {name: goal for each in of_parts for name, goal in each.items()}
        case LowRank(left=left, right=right):
            known = before if isinstance(before, LowRank) else weight
            return {
                **goals(left, known.left, known.left.unpack(torch.float32), f"{path}left."),
                **goals(right, known.right, known.right.unpack(torch.float32), f"{path}right."),
            }
    return {}

"""GuidedQuant (arXiv 2505.07004): tokens weigh as much as the loss depends on what a layer makes of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from decoct.methods.base import LinearMethod, refusal
from decoct.stats import Gram, PairedGram
from decoct.weights import Dense, Masked, QuantizedInput, Rotated, Sparse, Weight, stack

SecondMoments = Gram | PairedGram
"""Statistics that are sums over tokens of products of two input features, so that a token can weigh more or less."""


@dataclass(frozen=True, slots=True)
class ByGroup:
    """A kind of statistic: one of `kind` for each group of a matrix's rows, with weights for the tokens.

    Attributes:
        kind: Gram or PairedGram.
        groups: how many.
        slot: whose rows they are, by its name within the block: unlike inputs, weights are not shared by an edge's
            readers. Empty where the method does not know it yet.
    """

    kind: type[Gram] | type[PairedGram]
    groups: int
    slot: str = ""

    def empty(self, width: int) -> "GroupedMoments":
        """Of no tokens."""
        parts = tuple(self.kind.empty(width) for _ in range(self.groups))
        return GroupedMoments(parts, torch.zeros(self.groups, dtype=torch.float64))

    def neutral(self, width: int) -> "GroupedMoments":
        """What white inputs of tokens that all weigh the same would give."""
        parts = tuple(self.kind.neutral(width) for _ in range(self.groups))
        return GroupedMoments(parts, torch.ones(self.groups, dtype=torch.float64))

    def nbytes_for(self, width: int) -> int:
        """Bytes of all groups' accumulators."""
        return self.groups * (self.kind.nbytes_for(width) + 8)


class GroupedMoments:
    """For each group of rows, Σ c·x·xᵀ over tokens, c the token's weight in that group.

    Attributes:
        parts: the groups' sums; each counts all tokens.
        mass: [groups] float64, the sum of each group's weights.
    """

    def __init__(self, parts: Sequence[SecondMoments], mass: Float[Tensor, " groups"]) -> None:
        self.parts = tuple(parts)
        self.mass = mass

    @property
    def num_tokens(self) -> int:
        """How many inputs it holds."""
        return self.parts[0].num_tokens

    def add(self, x: Float[Tensor, "tokens in"]) -> None:
        """Add tokens that all weigh 1: where no weights are known, as in a rehearsal."""
        self.add_weighted(x, torch.ones(x.shape[0], len(self.parts)))

    def add_weighted(
        self,
        x: Float[Tensor, "tokens in"],
        weights: Float[Tensor, "tokens groups"],
        original: Float[Tensor, "tokens in"] | None = None,
    ) -> None:
        """Add tokens.

        Args:
            x: inputs.
            weights: not negative.
            original: what the uncompressed model has in place of `x`, where the kind compares with it.
        """
        for part, weight in zip(self.parts, weights.float().T, strict=True):
            root = weight.sqrt().unsqueeze(1)  # products of √c·x are c times those of x
            if isinstance(part, PairedGram) and original is not None:
                part.add_pair(x.float() * root, original.float() * root)
            else:
                part.add(x.float() * root)
        self.mass += weights.sum(0, dtype=torch.float64)

    def merge(self, other: Self) -> Self:
        """The sums over both sets of tokens."""
        pairs = zip(self.parts, other.parts, strict=True)
        return type(self)([_merged(mine, theirs) for mine, theirs in pairs], self.mass + other.mass)

    def of_group(self, group: int) -> SecondMoments:
        """A group's statistic, its weights brought to a mean of 1, so that sizes are those of unweighted inputs.

        A group whose outputs the loss does not depend on at all gets a neutral one.
        """
        part, mass = self.parts[group], float(self.mass[group])
        width = (part if isinstance(part, Gram) else part.gram).total.shape[0]
        if mass == 0:
            return type(part).neutral(width)
        return part.scaled(torch.full((width,), (part.num_tokens / mass) ** 0.5))

    def scaled(self, factor: Float[Tensor, "in"]) -> Self:
        """The statistic of factor·x."""
        return type(self)([part.scaled(factor) for part in self.parts], self.mass)

    def rotated(self) -> Self:
        """The statistic of H·x."""
        return type(self)([part.rotated() for part in self.parts], self.mass)


@dataclass(frozen=True, slots=True, kw_only=True)
class Guided(LinearMethod):
    """Another method, run on contiguous groups of a matrix's rows, each with a statistic of its own.

    To second order the loss depends on an error in output j at a token with the squared gradient by that output. A
    matrix of its own for each row would be too much work, so rows go in groups that share the mean. Recipes write it as
    the key `guided` of a rule.

    Attributes:
        method: what compresses each group; its statistic is a Gram matrix, or that of GPTAQ.
        groups: of rows; the paper takes 4, and 1 for its smallest setting.
    """

    method: LinearMethod
    groups: int = 4

    def __post_init__(self) -> None:
        if self.groups < 1:
            raise ValueError(f"guided is the number of groups of output features, at least 1, not {self.groups}")
        if self.method.stat not in (Gram, PairedGram):
            raise ValueError("guided weighs tokens in a Gram matrix, which this method does not use; leave guided out")

    @property
    @override
    def stat(self) -> ByGroup:
        return ByGroup(PairedGram if self.method.stat is PairedGram else Gram, self.groups)

    @override
    def check(self, shape: tuple[int, int]) -> None:
        """Each group has rows, and the method takes and leaves matrices of a group's shape."""
        if shape[0] < self.groups:
            raise ValueError(f"guided: {self.groups} groups need as many output features, not {shape[0]}")
        for part in self._shapes(shape):
            self.method.check(part)
            if self.method.leaves(part) != (part,):
                raise ValueError("guided splits a matrix into groups of rows, which a factorization cannot follow")

    @override
    def workspace(self, shape: tuple[int, int]) -> int:
        """The method's on the largest group, that group's rows and statistic, and what was made of the others."""
        part = max(self._shapes(shape))
        apart = 4 * (prod(part) + prod(shape)) + 2 * self.stat.kind.nbytes_for(shape[1])
        return self.method.workspace(part) + apart

    @override
    def operations(self, shape: tuple[int, int]) -> float:
        """The method's, for each group."""
        return sum(map(self.method.operations, self._shapes(shape)))

    @override
    def compress(self, weight: Weight, stat: GroupedMoments) -> Weight:
        """Compress each group of rows; one weight of the method's kind where groups can be stored together.

        Raises:
            ValueError: whatever the method refuses, and a weight without rows of its own (low rank, quantized).
        """
        match weight:
            case QuantizedInput(inner=inner):
                return weight.with_children({"inner": self.compress(inner, stat)})
            case Rotated(inner=inner, left=None, right=right) if right is not None:
                seen = stat.scaled(right.float()).rotated()
                return Rotated.of(self.compress(inner, seen), None, right)
            case Dense() | Sparse() | Masked(inner=Dense()):
                groups = enumerate(row_groups(weight.shape[0], self.groups))
                return stack([self.method.compress(_rows(weight, rows), stat.of_group(g)) for g, rows in groups])
        raise refusal("guided", weight)

    def _shapes(self, shape: tuple[int, int]) -> list[tuple[int, int]]:
        return [(rows.stop - rows.start, shape[1]) for rows in row_groups(shape[0], self.groups)]


def row_groups(out: int, groups: int) -> list[slice]:
    """Contiguous groups of nearly the same size."""
    return [slice(out * group // groups, out * (group + 1) // groups) for group in range(groups)]


def group_means(squares: Float[Tensor, "tokens out"], groups: int) -> Float[Tensor, "tokens groups"]:
    """The mean over each group of output features."""
    return torch.stack([squares[:, rows].mean(1) for rows in row_groups(squares.shape[1], groups)], 1)


def _rows(weight: Weight, rows: slice) -> Weight:
    """Some rows of a weight that is not quantized; those that are whole stay dense."""
    match weight:
        case Sparse():
            return Sparse.of(weight.unpack()[rows], weight.survivors()[rows])
        case Masked(inner=Dense(values=values)):
            return Masked.of(Dense.of(values[rows]), weight.survivors()[rows])
        case Dense(values=values):
            return Dense.of(values[rows])
    raise AssertionError(f"a {weight.kind} has no rows of its own")


def _merged(mine: SecondMoments, theirs: SecondMoments) -> SecondMoments:
    if isinstance(mine, Gram) and isinstance(theirs, Gram):
        return mine.merge(theirs)
    assert isinstance(mine, PairedGram)
    assert isinstance(theirs, PairedGram)
    return mine.merge(theirs)

"""What methods that prune single weights share: how much drops and where, and which weights they can follow."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from decoct.methods.base import LinearMethod, refusal
from decoct.ops.sparsity import Pattern
from decoct.weights import Dense, FloatBlock, GroupInt, Masked, Sparse, Weight

SCOPES = ("row", "layer")
_HALF = 0.5

Score = Callable[[Float[Tensor, "out in"]], Float[Tensor, "out in"]]
"""Matrix, any float dtype -> what each entry is worth, float32, not negative."""

Refit = Callable[
    [Float[Tensor, "out in"], Bool[Tensor, "out in"] | None],
    tuple[Float[Tensor, "out in"], Bool[Tensor, "out in"]],
]
"""(float32 matrix, mask of what earlier steps left or None) -> (new values, which of them survive: a subset)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruning(LinearMethod):
    """Sets weights to zero, one by one or n of every m; subclasses say which, and what becomes of the others.

    Unstructured zeros make the file smaller, not the matrix product faster; each stored weight also costs one bit
    of bitmap.

    Attributes:
        sparsity: fraction removed; not together with n and m, which say it.
        n: with `m`: entries that survive of every m consecutive ones of a row (2 of 4 for sparse tensor cores).
        m: see n.
        scope: of a `sparsity`: "row": it is that of every row; "layer": that of the whole matrix, rows may differ.
        owl: how far a block's sparsity may lie from `sparsity`, their average: blocks with more outlying weights keep
            more (OWL, arXiv 2310.05175, which takes 0.08). 0: all blocks alike. Needs data.
    """

    sparsity: float = _HALF
    n: int | None = None
    m: int | None = None
    scope: str = "row"
    owl: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.sparsity < 1:
            meant = f"; did you mean {self.sparsity / 100:g}?" if 1 < self.sparsity < 100 else ""
            raise ValueError(f"sparsity must be more than 0 and less than 1, not {self.sparsity}{meant}")
        if (self.n is None) != (self.m is None):
            raise ValueError("n and m go together: n of every m weights survive")
        if self.n is not None and self.m is not None and not 0 < self.n < self.m:
            raise ValueError(f"n must be more than 0 and less than m={self.m}, not {self.n}")
        if self.n is not None and self.m is not None and self.sparsity not in (_HALF, 1 - self.n / self.m):
            raise ValueError(
                f"n={self.n} of m={self.m} leave nothing for sparsity={self.sparsity} to say; leave one out"
            )
        if self.owl < 0 or (self.owl and not (2 * self.owl < self.sparsity and self.sparsity + 2 * self.owl < 1)):
            raise ValueError(f"owl={self.owl} does not fit between no and all weights at a sparsity of {self.sparsity}")
        if self.owl and self.n is not None:
            raise ValueError("n of every m weights survive in every block alike; leave owl out")
        if self.scope not in SCOPES:
            raise ValueError(f"scope must be one of {', '.join(SCOPES)}, not {self.scope!r}")

    def check(self, shape: tuple[int, int]) -> None:
        """An N:M pattern must divide the input features, and a sparsity must drop some weights and leave some."""
        if self.m is not None and shape[1] % self.m:
            raise ValueError(f"a pattern of {self.n}:{self.m} does not divide {shape[1]} input features")
        pattern = self.pattern(shape)
        if not 0 < pattern.num_dropped < pattern.run:
            drops, remedy = ("none", "a larger one") if pattern.num_dropped == 0 else ("all", "a smaller one")
            raise ValueError(f"sparsity {self.sparsity} drops {drops} of {pattern.run} weights; take {remedy}")

    def workspace(self, shape: tuple[int, int]) -> int:
        """The matrix in float32, what entries are worth, and, to rank them all at once, their values and numbers."""
        return (20 if self.scope == "row" else 32) * shape[0] * shape[1]

    def pattern(self, shape: tuple[int, int]) -> Pattern:
        """How many entries of which runs drop in a matrix of this shape."""
        if self.n is not None and self.m is not None:
            return Pattern(self.m - self.n, self.m)
        run = shape[1] if self.scope == "row" else shape[0] * shape[1]
        return Pattern(round(self.sparsity * run), run)

    def drop(self, weight: Weight, score: Score, name: str) -> Weight:
        """Zero what scores least and leave the rest as it is.

        Args:
            weight: Dense; Sparse or Masked: what was pruned stays pruned, and counts; GroupInt or FloatBlock: what
                survives stays quantized.
            score: what each entry is worth.
            name: the method's name, for the message.

        Raises:
            ValueError: another kind of weight, a shape that does not fit, or numbers that are not finite.
        """
        if not isinstance(weight, Dense | Sparse | GroupInt | FloatBlock | Masked):
            raise refusal(name, weight)
        values = finite(weight.unpack())
        self.check(weight.shape)
        kept = weight.survivors() if isinstance(weight, Sparse | Masked) else None
        survivors = self.pattern(weight.shape).survivors(score(values), kept)
        match weight:
            case Dense() | Sparse():
                return Sparse.of(values, survivors)
            case Masked(inner=inner):
                return Masked.of(inner, survivors)
        return Masked.of(weight, survivors)

    def refit(self, weight: Weight, rule: Refit, name: str) -> Weight:
        """Zero weights and move the others, as a rule for dense matrices says.

        Args:
            weight: Dense; Sparse, or Masked over Dense: what was pruned stays pruned.
            rule: see Refit.
            name: the method's name, for the message.

        Raises:
            ValueError: another kind of weight, a shape that does not fit, or numbers that are not finite.
        """
        if not isinstance(weight, Dense | Sparse) and not (
            isinstance(weight, Masked) and isinstance(weight.inner, Dense)
        ):
            raise refusal(name, weight)
        self.check(weight.shape)
        values, survivors = rule(
            finite(weight.unpack()).float(), None if isinstance(weight, Dense) else weight.survivors()
        )
        stored = values.to(weight.dtype)
        if not torch.isfinite(stored[survivors]).all():
            raise ValueError(f"what makes up for the pruned weights is too large for {weight.dtype}; use wanda here")
        if isinstance(weight, Masked):
            return Masked.of(Dense.of(stored), survivors)
        return Sparse.of(stored, survivors)


def finite(values: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """The same.

    Raises:
        ValueError: a value is NaN or infinite.
    """
    if not torch.isfinite(values).all():
        raise ValueError("the weights hold NaN or infinite values; the checkpoint is damaged")
    return values

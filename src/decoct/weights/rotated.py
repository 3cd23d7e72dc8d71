"""Rotated: another weight, seen through a Hadamard transform on either side and scales of rows and columns."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from decoct.ops.hadamard import hadamard
from decoct.weights.base import Weight


@dataclass(frozen=True, eq=False, slots=True)
class Rotated(Weight):
    """diag(left) · Hᵀ · inner · H · diag(right), with H the orthonormal transforms of both lengths.

    With random signs in `left` and `right` this is the incoherence processing of QuIP# (arXiv 2402.04396): the entries
    of `inner` look Gaussian whatever the matrix was. With `right` alone it is a matrix whose inputs are transformed
    while the model runs (QuaRot, arXiv 2404.00456): `inner` reads H · diag(right) · x.

    Attributes:
        inner: any weight of the same shape.
        left: a signed scale for each row, [out]; None: rows are not transformed.
        right: a signed scale for each column, [in]; None: columns are not transformed.
    """

    kind: ClassVar[str] = "Rotated"
    inner: Weight
    left: Float[Tensor, " out"] | None
    right: Float[Tensor, " in"] | None

    @classmethod
    def of(cls, inner: Weight, left: Float[Tensor, " out"] | None, right: Float[Tensor, " in"] | None) -> "Rotated":
        """Rotate a weight.

        Raises:
            ValueError: the scales are not one for each row and one for each column, or both are absent.
        """
        if left is None and right is None:
            raise ValueError("a rotated weight is transformed on one side at least")
        given = tuple(n if side is None else len(side) for n, side in zip(inner.shape, (left, right), strict=True))
        if given != inner.shape:
            raise ValueError(f"{given[0]} and {given[1]} scales do not fit a weight {inner.shape}")
        return cls(inner.shape, inner.dtype, inner, left, right)

    def unscaled(self) -> Float[Tensor, "out in"]:
        """Hᵀ · inner · H, float32, with what sides there are."""
        matrix = self.inner.unpack(torch.float32)
        if self.left is not None:
            matrix = hadamard(matrix, inverse=True, dim=0)
        return matrix if self.right is None else hadamard(matrix, inverse=True)

    @override
    def apply(self, x: Float[Tensor, "*tokens in"]) -> Float[Tensor, "*tokens out"]:
        if not self.quantizes_inputs:
            return torch.nn.functional.linear(x, self.unpack(x.dtype))
        turned = x if self.right is None else hadamard(x.float() * self.right.float()).to(x.dtype)
        out = self.inner.apply(turned)
        return out if self.left is None else (hadamard(out.float(), inverse=True) * self.left.float()).to(x.dtype)

    @override
    def unpack(self, dtype: torch.dtype | None = None) -> Float[Tensor, "out in"]:
        matrix = self.unscaled()
        if self.left is not None:
            matrix = matrix * self.left.float()[:, None]
        if self.right is not None:
            matrix = matrix * self.right.float()
        return matrix.to(dtype or self.dtype)

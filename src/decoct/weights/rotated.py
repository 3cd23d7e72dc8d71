"""Rotated: another weight, seen through a Hadamard transform on each side and scales of rows and columns."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from decoct.ops.hadamard import hadamard, rotate_back
from decoct.weights.base import Weight


@dataclass(frozen=True, eq=False, slots=True)
class Rotated(Weight):
    """diag(left) · Hᵀ · inner · H · diag(right), with H the orthonormal transforms of both lengths.

    With random signs in `left` and `right` this is the incoherence processing of QuIP# (arXiv 2402.04396): the entries
    of `inner` look Gaussian whatever the matrix was.

    Attributes:
        inner: any weight of the same shape.
        left: a signed scale for each row, [out].
        right: a signed scale for each column, [in].
    """

    kind: ClassVar[str] = "Rotated"
    inner: Weight
    left: Float[Tensor, " out"]
    right: Float[Tensor, " in"]

    @classmethod
    def of(cls, inner: Weight, left: Float[Tensor, " out"], right: Float[Tensor, " in"]) -> "Rotated":
        """Rotate a weight.

        Raises:
            ValueError: the scales are not one for each row and one for each column.
        """
        if (*left.shape, *right.shape) != inner.shape:
            raise ValueError(f"{list(left.shape)} and {list(right.shape)} scales do not fit a weight {inner.shape}")
        return cls(inner.shape, inner.dtype, inner, left, right)

    def unscaled(self) -> Float[Tensor, "out in"]:
        """Hᵀ · inner · H, float32."""
        return rotate_back(self.inner.unpack(torch.float32))

    @override
    def apply(self, x: Float[Tensor, "*tokens in"]) -> Float[Tensor, "*tokens out"]:
        if not self.quantizes_inputs:
            return torch.nn.functional.linear(x, self.unpack(x.dtype))
        turned = hadamard(x.float() * self.right.float()).to(x.dtype)
        out = hadamard(self.inner.apply(turned).float(), inverse=True)
        return (out * self.left.float()).to(x.dtype)

    @override
    def unpack(self, dtype: torch.dtype | None = None) -> Float[Tensor, "out in"]:
        scaled = self.unscaled() * self.left.float()[:, None] * self.right.float()
        return scaled.to(dtype or self.dtype)

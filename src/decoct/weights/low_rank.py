"""LowRank: a product of two thinner weights."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from decoct.weights.base import Weight


@dataclass(frozen=True, eq=False, slots=True)
class LowRank(Weight):
    """left · right; either factor may itself be compressed.

    Attributes:
        left: [out, rank].
        right: [rank, in].
    """

    kind: ClassVar[str] = "LowRank"
    left: Weight
    right: Weight

    @classmethod
    def of(cls, left: Weight, right: Weight) -> "LowRank":
        """Multiply two weights.

        Raises:
            ValueError: the inner dimensions differ.
        """
        if left.shape[1] != right.shape[0]:
            raise ValueError(f"factors {list(left.shape)} and {list(right.shape)} do not multiply")
        return cls((left.shape[0], right.shape[1]), left.dtype, left, right)

    @property
    def rank(self) -> int:
        """Width of the bottleneck."""
        return self.left.shape[1]

    @override
    def apply(self, x: Float[Tensor, "*tokens in"]) -> Float[Tensor, "*tokens out"]:
        if not self.quantizes_inputs:
            return torch.nn.functional.linear(x, self.unpack(x.dtype))
        return self.left.apply(self.right.apply(x))

    @override
    def unpack(self, dtype: torch.dtype | None = None) -> Float[Tensor, "out in"]:
        product = self.left.unpack(torch.float32) @ self.right.unpack(torch.float32)
        return product.to(dtype or self.dtype)

    @override
    def unpack_rows(self, rows: Int[Tensor, "*n"] | slice, dtype: torch.dtype | None = None) -> Float[Tensor, "*n in"]:
        product = self.left.unpack_rows(rows, torch.float32) @ self.right.unpack(torch.float32)
        return product.to(dtype or self.dtype)

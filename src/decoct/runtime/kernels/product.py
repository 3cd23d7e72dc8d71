"""What every product of inputs with a packed weight can do, and the one that works for any weight."""

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from decoct.weights import Weight

MOST_DIRECT = 16
"""Rows of inputs that are multiplied with packed codes; for more, unpacking pays."""


class Product(ABC):
    """x·Wᵀ for one weight W [out, in] that stays packed; made once, called for every token.

    Attributes:
        shape: (out, in).
        dtype: what the matrix was before it was compressed.
        kernel: the name of what multiplies: "unpack", or that of a compiled kernel.
        nbytes: of everything it holds.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    kernel: str
    nbytes: int

    @abstractmethod
    def __call__(self, x: Float[Tensor, "*tokens in"]) -> Float[Tensor, "*tokens out"]:
        """The product, in x's dtype."""

    @abstractmethod
    def unpack(self, dtype: torch.dtype | None = None) -> Float[Tensor, "out in"]:
        """The matrix, in `dtype` (default: `self.dtype`)."""

    @abstractmethod
    def rows(self, ids: Int[Tensor, "*n"], dtype: torch.dtype | None = None) -> Float[Tensor, "*n in"]:
        """Some rows of the matrix: what an embedding looks up."""

    def describe(self) -> str:
        """The kernel's name, with those of nested ones."""
        return self.kernel


class Unpacking(Product):
    """Unpacks the weight for every call: right for any weight, and what is left where no kernel fits."""

    kernel = "unpack"

    def __init__(self, weight: Weight) -> None:
        self.weight = weight
        self.shape, self.dtype, self.nbytes = weight.shape, weight.dtype, weight.nbytes

    @override
    def __call__(self, x: Float[Tensor, "*tokens in"]) -> Float[Tensor, "*tokens out"]:
        return self.weight.apply(x)

    @override
    def unpack(self, dtype: torch.dtype | None = None) -> Float[Tensor, "out in"]:
        return self.weight.unpack(dtype or self.dtype)

    @override
    def rows(self, ids: Int[Tensor, "*n"], dtype: torch.dtype | None = None) -> Float[Tensor, "*n in"]:
        return self.weight.unpack_rows(ids, dtype or self.dtype)

"""Products with weights that consist of others: the weight's own algebra, over parts that kernels multiply."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from decoct.runtime.kernels.dense import dense_product
from decoct.runtime.kernels.product import MOST_DIRECT, Product
from decoct.weights import Columns, LowRank, QuantizedInput, Weight


@dataclass(frozen=True, eq=False, slots=True)
class Part(Weight):
    """A product in the place of the weight it was made of, so that expressions can go on with it."""

    kind: ClassVar[str] = "Part"
    product: Product

    @classmethod
    def of(cls, product: Product) -> "Part":
        """Stand for a product's weight."""
        return cls(product.shape, product.dtype, product)

    @property
    @override
    def quantizes_inputs(self) -> bool:
        """So that what it is nested in applies it, instead of unpacking it."""
        return True

    @override
    def apply(self, x: Float[Tensor, "*tokens in"]) -> Float[Tensor, "*tokens out"]:
        return self.product(x)

    @override
    def unpack(self, dtype: torch.dtype | None = None) -> Float[Tensor, "out in"]:
        return self.product.unpack(dtype)

    @override
    def unpack_rows(self, rows: Int[Tensor, "*n"] | slice, dtype: torch.dtype | None = None) -> Float[Tensor, "*n in"]:
        chosen = torch.arange(self.shape[0])[rows] if isinstance(rows, slice) else rows
        return self.product.rows(chosen, dtype)


class Composed(Product):
    """Sum, LowRank, Rotated, Stacked, Padded, QuantizedInput: in float32 between their parts.

    A prompt goes through the factors of a LowRank in its own dtype, where that is less work than their product.

    Attributes:
        factors: left and right, if it is a product of two whose inputs are not rounded.
    """

    def __init__(self, weight: Weight, parts: dict[str, Product]) -> None:
        self.shape, self.dtype, self.kernel = weight.shape, weight.dtype, weight.kind
        self._parts = tuple(parts.values())
        thin = isinstance(weight, LowRank) and not weight.quantizes_inputs
        self.factors = (parts["left"], parts["right"]) if thin else None
        rank = parts["left"].shape[1] if thin else 0
        self._thin = rank * sum(weight.shape) < weight.shape[0] * weight.shape[1]
        self._expression = weight.with_children({name: Part.of(part) for name, part in parts.items()})
        self._rounds_inputs = isinstance(weight, QuantizedInput) or weight.quantizes_inputs
        self.nbytes = self._expression.nbytes + sum(part.nbytes for part in self._parts)

    @override
    def __call__(self, x: Float[Tensor, "*tokens in"]) -> Float[Tensor, "*tokens out"]:
        if self._rounds_inputs:
            return self._expression.apply(x)
        if x.numel() // self.shape[1] > MOST_DIRECT:
            if self.factors is not None and self._thin and x.dtype != torch.float16:  # half's range is too small
                return self.factors[0](self.factors[1](x))
            return dense_product(x, self.unpack(x.dtype))
        return self._expression.apply(x.float()).to(x.dtype)

    @override
    def unpack(self, dtype: torch.dtype | None = None) -> Float[Tensor, "out in"]:
        return self._expression.unpack(dtype or self.dtype)

    @override
    def rows(self, ids: Int[Tensor, "*n"], dtype: torch.dtype | None = None) -> Float[Tensor, "*n in"]:
        return self._expression.unpack_rows(ids, dtype or self.dtype)

    @override
    def describe(self) -> str:
        return f"{self.kernel}({', '.join(part.describe() for part in self._parts)})"


class Gathered(Product):
    """Some input features are picked out, and multiplied with the columns that are kept."""

    def __init__(self, weight: Columns, kept: Product) -> None:
        self.shape, self.dtype, self.kernel = weight.shape, weight.dtype, weight.kind
        self._kept, self._index = kept, weight.index.long()
        self.nbytes = kept.nbytes + self._index.nbytes

    @override
    def __call__(self, x: Float[Tensor, "*tokens in"]) -> Float[Tensor, "*tokens out"]:
        return self._kept(x.index_select(-1, self._index))

    @override
    def unpack(self, dtype: torch.dtype | None = None) -> Float[Tensor, "out in"]:
        return self._spread(self._kept.unpack(dtype or self.dtype))

    @override
    def rows(self, ids: Int[Tensor, "*n"], dtype: torch.dtype | None = None) -> Float[Tensor, "*n in"]:
        return self._spread(self._kept.rows(ids, dtype or self.dtype))

    def _spread(self, values: Float[Tensor, "*n kept"]) -> Float[Tensor, "*n in"]:
        found = values.new_zeros(*values.shape[:-1], self.shape[1])
        found[..., self._index] = values
        return found

    @override
    def describe(self) -> str:
        return f"{self.kernel}({self._kept.describe()})"

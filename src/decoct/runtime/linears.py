"""Linear layers of the decode loop: products of several weights that read the same, side by side, and a bias."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from decoct.runtime.kernels import Product, linear
from decoct.runtime.kernels.compiled import Compiled
from decoct.weights import Dense, Weight
from decoct.weights.stacked import Stacked, stack


@dataclass(frozen=True, slots=True)
class Linear:
    """x·Wᵀ + b; several weights give their outputs side by side.

    Attributes:
        products: of each weight.
        bias: [out], in the dtype of the inputs; None: none.
    """

    products: tuple[Product, ...]
    bias: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the weights as they are held."""
        return sum(product.nbytes for product in self.products)

    @property
    def kernels(self) -> set[str]:
        """What multiplies."""
        return {product.kernel for product in self.products}

    def round_prompts(self) -> bool:
        """From now on round many inputs to 8 bits, where there is a kernel for it; whether there is one."""
        able = [product for product in self.products if isinstance(product, Compiled) and product.can_round]
        for product in able:
            product.rounds_prompts = True
        return bool(able)

    def __call__(self, x: Float[Tensor, "tokens in"]) -> Float[Tensor, "tokens out"]:
        """Multiply, and add the bias."""
        if len(self.products) == 1:
            y = self.products[0](x)
        else:
            y = torch.cat([product(x) for product in self.products], dim=-1)
        return y if self.bias is None else y + self.bias


def joined(weights: Sequence[Weight], bias: Tensor | None, dtype: torch.dtype) -> Linear:
    """A layer of weights that read the same inputs of `dtype`: one product where their kinds agree."""
    whole = stack(weights)
    apart = isinstance(whole, Stacked) and len(weights) > 1
    return Linear(tuple(product(weight, dtype) for weight in (weights if apart else [whole])), bias)


def product(weight: Weight, dtype: torch.dtype) -> Product:
    """What multiplies inputs of `dtype` with a weight; an uncompressed one is held in that dtype."""
    return linear(Dense.of(weight.unpack(dtype)) if isinstance(weight, Dense) else weight)

"""Sum: several weights added, e.g. a quantized matrix and the low-rank part of what it lost."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from decoct.weights.base import Weight


@dataclass(frozen=True, eq=False, slots=True)
class Sum(Weight):
    """The sum of its terms.

    Attributes:
        terms: two or more weights of one shape.
    """

    kind: ClassVar[str] = "Sum"
    terms: tuple[Weight, ...]

    @classmethod
    def of(cls, *terms: Weight) -> "Sum":
        """Add weights.

        Raises:
            ValueError: fewer than two terms, or shapes that differ.
        """
        if len(terms) < 2 or any(term.shape != terms[0].shape for term in terms):
            raise ValueError(f"a sum takes two or more weights of one shape, not {[list(t.shape) for t in terms]}")
        return cls(terms[0].shape, terms[0].dtype, terms)

    @override
    def apply(self, x: Float[Tensor, "*tokens in"]) -> Float[Tensor, "*tokens out"]:
        if not self.quantizes_inputs:
            return torch.nn.functional.linear(x, self.unpack(x.dtype))
        total = self.terms[0].apply(x)
        for term in self.terms[1:]:
            total = total + term.apply(x)
        return total

    @override
    def unpack(self, dtype: torch.dtype | None = None) -> Float[Tensor, "out in"]:
        total = self.terms[0].unpack(torch.float32)
        for term in self.terms[1:]:
            total = total + term.unpack(torch.float32)
        return total.to(dtype or self.dtype)

    @override
    def unpack_rows(self, rows: Int[Tensor, "*n"] | slice, dtype: torch.dtype | None = None) -> Float[Tensor, "*n in"]:
        parts = [term.unpack_rows(rows, torch.float32) for term in self.terms]
        return torch.stack(parts).sum(0).to(dtype or self.dtype)

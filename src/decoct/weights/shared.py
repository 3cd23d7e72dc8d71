"""Shared: another slot's weight, used again and stored once."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from decoct.weights.base import Weight


@dataclass(frozen=True, eq=False, slots=True)
class Shared(Weight):
    """A reference to the weight of the slot called `target`; it stores nothing itself.

    Attributes:
        target: full name of the slot that owns the weight.
        owner: that weight; None until a reader has resolved the reference.
    """

    kind: ClassVar[str] = "Shared"
    target: str
    owner: Weight | None = None

    @classmethod
    def of(cls, target: str, owner: Weight) -> "Shared":
        """Refer to `owner`, which is stored under `target`."""
        return cls(owner.shape, owner.dtype, target, owner)

    def children(self) -> dict[str, Weight]:
        """None: the owner's tensors are stored, and counted, where they belong."""
        return {}

    def with_tensors(self, tensors: dict[str, Tensor]) -> "Shared":
        """Itself: it has no tensors."""
        assert not tensors
        return self

    @override
    def unpack(self, dtype: torch.dtype | None = None) -> Float[Tensor, "out in"]:
        return self._resolved().unpack(dtype or self.dtype)

    @override
    def unpack_rows(self, rows: Int[Tensor, "*n"] | slice, dtype: torch.dtype | None = None) -> Float[Tensor, "*n in"]:
        return self._resolved().unpack_rows(rows, dtype or self.dtype)

    @override
    def apply(self, x: Float[Tensor, "*tokens in"]) -> Float[Tensor, "*tokens out"]:
        return self._resolved().apply(x)

    @property
    @override
    def quantizes_inputs(self) -> bool:
        return self.owner is not None and self.owner.quantizes_inputs

    def _resolved(self) -> Weight:
        if self.owner is None:
            raise ValueError(f"this weight is shared with {self.target}, which has not been loaded yet")
        return self.owner

"""Dense: the matrix itself."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from decoct.weights.base import Weight


@dataclass(frozen=True, eq=False, slots=True)
class Dense(Weight):
    """An uncompressed matrix.

    Attributes:
        values: [out, in], any float dtype.
    """

    kind: ClassVar[str] = "Dense"
    values: Float[Tensor, "out in"]

    @classmethod
    def of(cls, values: Float[Tensor, "out in"]) -> "Dense":
        """Wrap a matrix.

        Raises:
            ValueError: the tensor is not a matrix.
        """
        if values.ndim != 2:
            raise ValueError(f"a weight is a matrix [out, in], not a tensor of shape {list(values.shape)}")
        return cls((values.shape[0], values.shape[1]), values.dtype, values)

    @override
    def unpack(self, dtype: torch.dtype | None = None) -> Float[Tensor, "out in"]:
        return self.values.detach().to(dtype or self.dtype)

    @override
    def unpack_rows(self, rows: Int[Tensor, "*n"] | slice, dtype: torch.dtype | None = None) -> Float[Tensor, "*n in"]:
        return self.values.detach()[rows].to(dtype or self.dtype)

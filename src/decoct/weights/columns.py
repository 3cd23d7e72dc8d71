"""Columns: a few input features kept whole; all other entries are zero."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from decoct.weights.base import Weight


@dataclass(frozen=True, eq=False, slots=True)
class Columns(Weight):
    """Some columns of a matrix, for a sum with a weight that is zero there (OWQ; LLM.int8()'s outlier features).

    Attributes:
        values: [out, kept], any float dtype.
        index: the number of each column kept, ascending, int16 [kept] (int32 where in > 32768).
    """

    kind: ClassVar[str] = "Columns"
    values: Float[Tensor, "out kept"]
    index: Int[Tensor, " kept"]

    @classmethod
    def of(
        cls, values: Float[Tensor, "out kept"], index: Int[Tensor, " kept"], num_columns: int, dtype: torch.dtype
    ) -> "Columns":
        """Put columns, given in any order, into a matrix of `num_columns`; `dtype` is what that was before.

        Raises:
            ValueError: a column that is not there, or one given twice.
        """
        ascending, order = index.long().sort()
        if ascending.numel() and (ascending[0] < 0 or ascending[-1] >= num_columns or (ascending.diff() == 0).any()):
            raise ValueError(f"columns {index.tolist()} are not different columns of {num_columns}")
        small = torch.int16 if num_columns <= 2**15 else torch.int32
        shape = (values.shape[0], num_columns)
        return cls(shape, dtype, values[:, order].contiguous(), ascending.to(small))

    @override
    def unpack(self, dtype: torch.dtype | None = None) -> Float[Tensor, "out in"]:
        return self.unpack_rows(slice(None), dtype)

    @override
    def unpack_rows(self, rows: Int[Tensor, "*n"] | slice, dtype: torch.dtype | None = None) -> Float[Tensor, "*n in"]:
        values = self.values[rows].to(dtype or self.dtype)
        found = torch.zeros(*values.shape[:-1], self.shape[1], dtype=values.dtype, device=values.device)
        found[..., self.index.long()] = values
        return found

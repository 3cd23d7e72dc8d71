"""Ternary: values of {-1, 0, 1}, five to a byte, with a scale for each group of input features."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int, Int8, UInt8
from torch import Tensor
from typing_extensions import override

from decoct.ops.parallel import each_piece
from decoct.ops.trits import pack_trits, unpack_trits
from decoct.weights.base import Weight


@dataclass(frozen=True, eq=False, slots=True)
class Ternary(Weight):
    """value = trit * scale, at 1.6 bits for each trit.

    Attributes:
        trits: the trits of each row in base 3, uint8 [out, ceil(in / 5)].
        scale: [out, groups], or [1, 1] for one scale in all.
        group_size: input features that share a scale.
    """

    kind: ClassVar[str] = "Ternary"
    trits: UInt8[Tensor, "out trit_bytes"]
    scale: Float[Tensor, "rows groups"]
    group_size: int

    @classmethod
    def of(
        cls, trits: Int8[Tensor, "out in"], scale: Float[Tensor, "rows groups"], group_size: int, dtype: torch.dtype
    ) -> "Ternary":
        """Pack trits; `scale` is stored as it is, `dtype` is what the matrix was before."""
        return cls((trits.shape[0], trits.shape[1]), dtype, pack_trits(trits), scale, group_size)

    def unpack_trits(self) -> Int8[Tensor, "out in"]:
        """The values before scaling."""
        return unpack_trits(self.trits, self.shape[1])

    @override
    def unpack(self, dtype: torch.dtype | None = None) -> Float[Tensor, "out in"]:
        out = torch.empty(self.shape, dtype=dtype or self.dtype, device=self.trits.device)

        def work(part: slice) -> None:
            out[part] = self.unpack_rows(part, out.dtype)

        each_piece(work, *self.shape, self.trits.device)
        return out

    @override
    def unpack_rows(self, rows: Int[Tensor, "*n"] | slice, dtype: torch.dtype | None = None) -> Float[Tensor, "*n in"]:
        trits = unpack_trits(self.trits[rows], self.shape[1]).float()
        scale = (self.scale[0] if self.scale.shape[0] == 1 else self.scale[rows]).float()
        grouped = trits.reshape(*trits.shape[:-1], self.scale.shape[1], self.group_size).mul_(scale.unsqueeze(-1))
        return grouped.flatten(-2).to(dtype or self.dtype)

    def pull_back(self, gradient: Float[Tensor, "out in"]) -> dict[str, Tensor]:
        """The gradient of each scale gathers trit·gradient over its group."""
        grouped = (self.unpack_trits() * gradient).reshape(self.shape[0], self.scale.shape[1], self.group_size).sum(-1)
        return {"scale": grouped if self.scale.shape[0] == self.shape[0] else grouped.sum(0, keepdim=True)}

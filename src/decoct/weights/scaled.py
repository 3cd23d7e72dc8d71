"""Scaled: a fixed matrix between scales of its rows and of its columns; never stored, but quick to unpack again."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from decoct.weights.base import Weight


@dataclass(frozen=True, eq=False, slots=True)
class Scaled(Weight):
    """diag(left) · middle · diag(right): what a rotated trellis is while only its scales are trained.

    Attributes:
        middle: constant.
        left: a scale for each row.
        right: a scale for each column.
    """

    kind: ClassVar[str] = "Scaled"
    middle: Float[Tensor, "out in"]
    left: Float[Tensor, " out"]
    right: Float[Tensor, " in"]

    @override
    def unpack(self, dtype: torch.dtype | None = None) -> Float[Tensor, "out in"]:
        scaled = self.middle.float() * self.left.float()[:, None]
        return scaled.mul_(self.right.float()).to(dtype or self.dtype)

    def pull_back(self, g: Float[Tensor, "out in"]) -> dict[str, Tensor]:
        """Gradients of the scales, float32, given that of the matrix."""
        steps = self.middle.float() * g
        return {"left": steps @ self.right.float(), "right": self.left.float() @ steps}

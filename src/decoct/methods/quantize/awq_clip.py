"""AWQ's clip search (arXiv 2306.00978): round to nearest within the span that costs each group's output least."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from typing_extensions import override

from decoct.methods.base import LinearMethod, quantize_structure
from decoct.ops.clip import fit_clip
from decoct.ops.grid import check_grid, quantize_packed, resolve_group_size, stored_scale_dtype
from decoct.stats import Gram
from decoct.weights import GroupInt, Weight


@dataclass(frozen=True, slots=True, kw_only=True)
class AWQClip(LinearMethod):
    """Round every weight to its group's nearest grid point, the grid shrunk to where the output error is least.

    The second half of AWQ, to follow a step of `awq`. The paper leaves queries and keys unclipped: give them `rtn`.

    Attributes:
        bits: 2 to 8.
        group_size: input features that share a scale, or "channel".
        symmetric: grid around zero, without zero points.
        ends: of a group's span: shrink both `alike`, or afterwards `each` alone (BitDistiller, arXiv 2402.10631), which
            needs zero points.
    """

    stat: ClassVar[type[Gram]] = Gram

    bits: int = 4
    group_size: int | str = 64
    symmetric: bool = True
    ends: Literal["alike", "each"] = "alike"

    def __post_init__(self) -> None:
        check_grid(self.bits, self.group_size)
        if self.group_size == "tensor":
            raise ValueError("awq_clip chooses a clip for each group; use a group size or channel")
        if self.ends == "each" and self.symmetric:
            raise ValueError("ends: each moves the ends of a span apart, which needs zero points; set symmetric: false")

    @override
    def check(self, shape: tuple[int, int]) -> None:
        resolve_group_size(self.group_size, shape[1])

    @override
    def workspace(self, shape: tuple[int, int]) -> int:
        """Weights, their change, its product with the Hessian, codes; the Hessian and what making it takes."""
        return 20 * shape[0] * shape[1] + 16 * shape[1] ** 2

    @override
    def operations(self, shape: tuple[int, int]) -> float:
        size = resolve_group_size(self.group_size, shape[1])
        tries = 63.0 if self.ends == "each" else 21.0
        return shape[0] * shape[1] * (tries * (2 * size + 100) + 4.0 * shape[1])

    @override
    def compress(self, weight: Weight, stat: Gram) -> Weight:
        return quantize_structure(weight, stat, self._dense, "awq_clip")

    def _dense(self, w: Float[Tensor, "out in"], mask: Bool[Tensor, "out in"] | None, stat: Gram) -> Weight:
        H = stat.matrix()
        values = w.float() if mask is None else torch.where(mask, w.float(), 0.0)
        values = values.masked_fill(torch.diagonal(H) == 0, 0.0)  # what no input reaches must not widen the grid
        grid = fit_clip(
            values,
            H,
            bits=self.bits,
            group_size=self.group_size,
            symmetric=self.symmetric,
            scale_dtype=stored_scale_dtype(w.dtype),
            apart=self.ends == "each",
        )
        return GroupInt.of_packed(quantize_packed(values, grid), (w.shape[0], w.shape[1]), grid, w.dtype)

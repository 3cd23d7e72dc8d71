"""GPTAQ (arXiv 2504.02692): GPTQ that also makes up for what compressing earlier blocks did to this layer's inputs."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from typing_extensions import override

from decoct.methods.base import LinearMethod, quantize_structure
from decoct.ops.feedback import Elimination, GridRounding
from decoct.ops.grid import check_grid, fit_grid, resolve_group_size, stored_scale_dtype
from decoct.stats import PairedGram
from decoct.weights import GroupInt, Weight


@dataclass(frozen=True, slots=True, kw_only=True)
class GPTAQ(LinearMethod):
    """Quantize feature by feature towards the outputs of the uncompressed model, not of the layer on its own inputs.

    A second chain of activations, of the model as it was, runs beside the first; it costs one more forward pass.

    Attributes:
        bits: 2 to 8.
        group_size: input features that share a scale, or "channel".
        symmetric: grid around zero, without zero points.
        alpha: how much of the inputs' change is made up for, 0 to 1; 0 is GPTQ.
        damping: fraction of the Hessian's mean diagonal added to its diagonal.
        act_order: quantize features in order of falling Hessian diagonal.
        clip_search: shrink each group's span to where its weighted squared error is least.
    """

    stat: ClassVar[type[PairedGram]] = PairedGram

    bits: int = 4
    group_size: int | str = 64
    symmetric: bool = True
    alpha: float = 0.25
    damping: float = 0.01
    act_order: bool = True
    clip_search: bool = True

    def __post_init__(self) -> None:
        check_grid(self.bits, self.group_size)
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must lie between 0 and 1, not {self.alpha}")
        if not 0 < self.damping <= 1:
            raise ValueError(f"damping must be above 0 and at most 1, not {self.damping}")

    @override
    def check(self, shape: tuple[int, int]) -> None:
        resolve_group_size(self.group_size, shape[1])

    @override
    def workspace(self, shape: tuple[int, int]) -> int:
        return 18 * shape[0] * shape[1] + 40 * shape[1] ** 2

    @override
    def operations(self, shape: tuple[int, int]) -> float:
        out, cols = shape
        return 4.0 * out * cols**2 + 6.0 * cols**3 + 3e7 * cols

    @override
    def compress(self, weight: Weight, stat: PairedGram) -> Weight:
        return quantize_structure(weight, stat, self._dense, "gptaq")

    def _dense(self, w: Float[Tensor, "out in"], mask: Bool[Tensor, "out in"] | None, stat: PairedGram) -> Weight:
        H = stat.gram.matrix()
        diagonal = torch.diagonal(H)
        values = w.float().masked_fill(diagonal == 0, 0.0)  # what no input reaches must not widen the grid
        grid = fit_grid(
            values,
            bits=self.bits,
            group_size=self.group_size,
            symmetric=self.symmetric,
            scale_dtype=stored_scale_dtype(w.dtype),
            importance=diagonal,
            search=self.clip_search,
        )
        moved = stat.cross * (2.0 * self.alpha / stat.num_tokens)
        rounding = GridRounding(grid, (w.shape[0], w.shape[1]), mask)
        Elimination.of(H, damping=self.damping, act_order=self.act_order, moved=moved).run(values, rounding)
        return GroupInt.of(rounding.finish(), grid, w.dtype)

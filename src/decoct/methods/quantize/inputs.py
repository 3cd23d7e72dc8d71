"""Inputs in few bits, token by token (ZeroQuant, arXiv 2206.01861), by groups, or with a scale chosen on a text."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from typing_extensions import override

from decoct.methods.base import LinearMethod, refusal
from decoct.ops.float_grid import FORMATS
from decoct.ops.input_grid import INPUT_FORMATS, InputGrid, check_input_grid, fixed_scale, input_group
from decoct.stats import AbsMax
from decoct.weights import LowRank, QuantizedInput, Rotated, Shared, Sum, Weight


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs(LinearMethod):
    """Round what a matrix is multiplied with, whenever it is: the A8 of W8A8. Stored weights stay as they are.

    Put it after the step that compresses the matrix. A rotated weight rounds its inputs once they are rotated; both
    factors of a low-rank pair round theirs; a sum rounds once for all its terms.

    Attributes:
        bits: 2 to 8, of integers.
        format: "int", or a floating-point format, which has its own bits: "fp8", "mxfp8", "mxfp6", "mxfp4", "nvfp4".
        group_size: features of a token that share a scale; "token": all of them; "tensor": one scale for all tokens,
            chosen on the calibration text; None takes the format's own: "token" for "int" and "fp8", else its block.
        symmetric: no zero points.
        clip_ratio: part of the extremes that the grid covers; 0.9 at 4 bits, as QuaRot has it, else 1.
    """

    quantizes_inputs: ClassVar[bool] = True

    bits: int = 8
    format: str = "int"
    group_size: int | str | None = None
    symmetric: bool = True
    clip_ratio: float = 1.0

    def __post_init__(self) -> None:
        if self.format not in INPUT_FORMATS:
            raise ValueError(f"format must be one of {', '.join(INPUT_FORMATS)}, not {self.format!r}")
        check_input_grid(self.grid)

    @property
    @override
    def stat(self) -> type[Any] | None:
        """The largest inputs, where a scale has to be chosen beforehand."""
        return AbsMax if self.grid.needs_scale else None

    @property
    def grid(self) -> InputGrid:
        """How inputs are rounded."""
        block = "token" if self.format == "int" else FORMATS[self.format][2]
        own = "token" if block == "channel" else block
        size = own if self.group_size is None else self.group_size
        return InputGrid(self.format, self.bits, size, self.symmetric, self.clip_ratio)

    @override
    def check(self, shape: tuple[int, int]) -> None:
        input_group(self.grid, shape[1])

    @override
    def compress(self, weight: Weight, stat: AbsMax | None = None) -> Weight:
        """Any weight that does not round its inputs yet."""
        if isinstance(weight, Shared):
            raise refusal("inputs", weight)
        if weight.quantizes_inputs:
            raise ValueError("its inputs are rounded already; leave one of the two steps out")
        if not torch.isfinite(weight.unpack()).all():
            raise ValueError("the weights hold NaN or infinite values; the checkpoint is damaged")
        return self._inside(weight, stat)

    def _inside(self, weight: Weight, stat: AbsMax | None) -> Weight:
        match weight:
            case Sum() if any(isinstance(node, Rotated) for node in weight.walk()):
                raise ValueError("its terms read different inputs, rotated and not; put inputs before the correction")
            case Rotated() | LowRank():
                if self.grid.needs_scale:
                    raise ValueError(
                        f"a {weight.kind} weight rounds inputs that no scale was chosen on; use int or fp8 by token"
                    )
                return weight.with_children({name: self._inside(w, None) for name, w in weight.children().items()})
        scale = None if stat is None else fixed_scale(self.grid, float(stat.peak().max()))
        return QuantizedInput.of(weight, self.grid, scale)

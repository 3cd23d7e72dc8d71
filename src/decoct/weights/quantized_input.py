"""QuantizedInput: another weight, whose inputs are rounded to a few bits before they are multiplied with it."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from decoct.ops.input_grid import InputGrid, check_input_grid, input_group, integer_inputs, round_inputs
from decoct.weights.base import Weight
from decoct.weights.dense import Dense
from decoct.weights.group_int import GroupInt


@dataclass(frozen=True, eq=False, slots=True)
class QuantizedInput(Weight):
    """x is rounded, then multiplied with `inner`. The matrix is that of `inner`; only `apply` differs.

    Gradients pass the rounding as if it were not there.

    Attributes:
        inner: any weight of the same shape that does not round its own inputs.
        scale: float32 [1], chosen on calibration inputs: the scale of every input, or the factor of NVFP4's scales;
            None where the input itself decides.
        kept: input features that are not rounded, int16 [kept] (int32 where in > 32768), or None.
        format: "int", or a floating-point format: "fp8", "mxfp8", "mxfp6", "mxfp4", "nvfp4".
        bits: 2 to 8, of integers.
        group_size: features that share a scale, "token" for all of them, or "tensor" for `scale`.
        symmetric: no zero points.
        clip_ratio: part of the extremes that is covered.
    """

    kind: ClassVar[str] = "QuantizedInput"
    inner: Weight
    scale: Float[Tensor, "1"] | None
    kept: Int[Tensor, " kept"] | None
    format: str
    bits: int
    group_size: int | str
    symmetric: bool
    clip_ratio: float

    @classmethod
    def of(
        cls,
        inner: Weight,
        grid: InputGrid,
        scale: Float[Tensor, "1"] | None = None,
        kept: Int[Tensor, " kept"] | None = None,
    ) -> "QuantizedInput":
        """Round a weight's inputs to `grid`.

        Raises:
            ValueError: a grid that does not fit the width, a scale where none or none where one is needed, or a weight
                that rounds its inputs already.
        """
        check_input_grid(grid)
        input_group(grid, inner.shape[1])
        if inner.quantizes_inputs:
            raise ValueError("its inputs are quantized already; give it one step of inputs")
        if grid.needs_scale != (scale is not None):
            raise ValueError("a scale chosen beforehand goes with group_size tensor, and with nvfp4")
        if kept is not None:
            kept = kept.long().sort().values.to(torch.int16 if inner.shape[1] <= 2**15 else torch.int32)
        return cls(
            shape=inner.shape,
            dtype=inner.dtype,
            inner=inner,
            scale=scale,
            kept=kept,
            format=grid.format,
            bits=grid.bits,
            group_size=grid.group_size,
            symmetric=grid.symmetric,
            clip_ratio=grid.clip_ratio,
        )

    @property
    @override
    def quantizes_inputs(self) -> bool:
        return True

    def grid(self) -> InputGrid:
        """How inputs are rounded."""
        return InputGrid(self.format, self.bits, self.group_size, self.symmetric, self.clip_ratio)

    @property
    def multiplies_integers(self) -> bool:
        """Whether both factors are integers with one scale a token and one a row: sums in int32 are then exact."""
        inner = self.inner
        return (
            self.format == "int"
            and self.symmetric
            and self.kept is None
            and self.group_size in ("token", "tensor")
            and isinstance(inner, GroupInt)
            and inner.symmetric
            and inner.scale.shape[1] == 1
        )

    def rounded(self, x: Float[Tensor, "*tokens in"]) -> Float[Tensor, "*tokens in"]:
        """What x is rounded to, in its dtype."""
        return round_inputs(x, self.grid(), self.scale, None if self.kept is None else self.kept.long())

    @override
    def apply(self, x: Float[Tensor, "*tokens in"]) -> Float[Tensor, "*tokens out"]:
        if self.multiplies_integers and not x.requires_grad and x.device.type == "cpu":
            return self._integer_product(x)
        return self.inner.apply(self.rounded(x))

    @override
    def unpack(self, dtype: torch.dtype | None = None) -> Float[Tensor, "out in"]:
        return self.inner.unpack(dtype or self.dtype)

    @override
    def unpack_rows(self, rows: Int[Tensor, "*n"] | slice, dtype: torch.dtype | None = None) -> Float[Tensor, "*n in"]:
        return self.inner.unpack_rows(rows, dtype or self.dtype)

    def _integer_product(self, x: Tensor) -> Tensor:
        """Sums of products of codes in int32, then scaled once, in float32."""
        inner = self.inner
        assert isinstance(inner, GroupInt)
        codes, step = integer_inputs(x.reshape(-1, x.shape[-1]), self.grid(), self.scale)
        weights = (inner.unpack_codes() - 2 ** (inner.bits - 1)).view(torch.int8)  # bytes below zero wrap around
        sums = torch._int_mm(codes, weights.T)  # noqa: SLF001 - torch's only product of int8 with int32 sums
        return sums.float().mul_(step).mul_(inner.scale.float().T).to(x.dtype).reshape(*x.shape[:-1], self.shape[0])


def ready(weight: Weight, dtype: torch.dtype) -> Weight:
    """A weight that is applied many times: whatever does not look at the inputs is unpacked once, into `dtype`."""
    if not weight.quantizes_inputs:
        return Dense.of(weight.unpack(dtype))
    if isinstance(weight, QuantizedInput) and weight.multiplies_integers:
        return weight
    return weight.with_children({name: ready(child, dtype) for name, child in weight.children().items()})

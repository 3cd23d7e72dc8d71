"""Blocks of small floating-point numbers that share a scale: FP8, the MX formats (arXiv 2310.10537), NVFP4.

A block's value is `element * scale`, or `element * scale * tensor_scale` where the scales are themselves small
floating-point numbers. Exact zero is always among the elements.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Shaped, UInt8
from torch import Tensor

from decoct.ops.grid import resolve_group_size, stored_scale
from decoct.ops.minifloat import ELEMENTS, decode, encode, exponent_of, power_of_two, rounded
from decoct.ops.packing import pack_bits, packed_width
from decoct.ops.parallel import each_piece

_E8M0_BIAS = 127
_E8M0_RANGE = (-126, 127)  # exponents that are normal numbers in float32
_E4M3 = ELEMENTS["e4m3"]

SCALES: dict[str, tuple[float, ...]] = {
    "e8m0": (1.0, 2.0, 0.5),
    "e4m3": (1.0, 1.5, 1.375, 1.25, 1.125, 0.9375, 0.875, 0.8125),
    "real": (1.0,),  # it moves all elements along their binades, some up, some down: nothing to be won
}
"""Kinds of scale, and the multiples of the usual one that a search tries."""

FORMATS: dict[str, tuple[str, str, int | str]] = {
    "fp8": ("e4m3", "real", "channel"),
    "mxfp8": ("e4m3", "e8m0", 32),
    "mxfp6": ("e2m3", "e8m0", 32),
    "mxfp4": ("e2m1", "e8m0", 32),
    "nvfp4": ("e2m1", "e4m3", 16),
}
"""Elements, kind of scale, and block of weights of each format that has a name."""


@dataclass(frozen=True, slots=True)
class FloatGrid:
    """The scales of one matrix.

    Attributes:
        scale: [rows, blocks], or [1, 1] for the whole matrix, as stored: in uint8, exponents + 127 ("e8m0") or codes
            ("e4m3"); or 16-bit floats ("real").
        tensor_scale: float32 [1], a factor of every "e4m3" scale; None for the other kinds.
        element: the elements' format, a key of `ELEMENTS`.
        scale_kind: a key of `SCALES`.
        block_size: consecutive input features that share a scale.
    """

    scale: Shaped[Tensor, "rows blocks"]
    tensor_scale: Float[Tensor, "1"] | None
    element: str
    scale_kind: str
    block_size: int

    def factors(self, rows: slice | Int[Tensor, "*n"] = slice(None)) -> Float[Tensor, "*n blocks"]:
        """The numbers that some rows' elements are multiplied by, float32; one row if it serves all."""
        stored = self.scale if self.scale.shape[0] == 1 else self.scale[rows]
        return _numbers(stored, self.scale_kind, self.tensor_scale)


def fit_float_grid(
    w: Float[Tensor, "rows cols"],
    *,
    element: str,
    scale_kind: str,
    block_size: int | str,
    search: bool = False,
    scale_dtype: torch.dtype = torch.bfloat16,
) -> FloatGrid:
    """Choose each block's scale.

    Without `search` it is what the formats' authors take: for "e8m0" the power of two that puts the block's largest
    entry into the elements' last binade (section 6.3 of the OCP's MX specification; the upper end of that binade
    is cut off), else what puts it onto the largest element. With it, neighbouring scales are tried and the one with the
    least squared error is kept.

    Args:
        w: the matrix; any float dtype.
        element: a key of `ELEMENTS`.
        scale_kind: a key of `SCALES`.
        block_size: columns that share a scale, or "channel" (a row each), or "tensor" (one for all).
        search: look for the best scale.
        scale_dtype: what "real" scales are stored in.

    Raises:
        ValueError: a block size that does not divide, or weights that are not finite or too large for their dtype.
    """
    rows, cols = w.shape
    size = resolve_group_size(block_size, cols)
    whole = block_size == "tensor"
    lines, width, length = (1, rows * cols, rows * cols) if whole else (rows, cols, size)
    tries = SCALES[scale_kind] if search else (1.0,)
    tensor_scale = _tensor_scale(w, element) if scale_kind == "e4m3" else None
    dtype = scale_dtype if scale_kind == "real" else torch.uint8
    grid = FloatGrid(
        torch.empty(lines, width // length, dtype=dtype, device=w.device), tensor_scale, element, scale_kind, size
    )
    values = w.reshape(lines, width)

    def fit(part: slice) -> None:
        blocks = values[part].float().reshape(-1, width // length, length)
        peak = blocks.abs().amax(-1)
        if not torch.isfinite(peak).all():
            raise ValueError("the weights hold NaN or infinite values; the checkpoint is damaged")
        grid.scale[part] = _best_scale(blocks, peak, grid, tries)
        step = grid.factors(part)
        if not torch.isfinite((rounded(peak / step, ELEMENTS[element]) * step).to(w.dtype)).all():
            raise ValueError(f"the weights come too near the largest {w.dtype} number; the checkpoint is damaged")

    each_piece(fit, lines, width, w.device)
    return grid


def encode_packed(w: Float[Tensor, "rows cols"], grid: FloatGrid) -> UInt8[Tensor, "rows bytes"]:
    """Every weight's nearest element, as a bit stream for each row."""
    rows, cols = w.shape
    kind = ELEMENTS[grid.element]
    packed = torch.empty(rows, packed_width(cols, kind.bits), dtype=torch.uint8, device=w.device)

    def work(part: slice) -> None:
        blocks = w[part].float().reshape(-1, cols // grid.block_size, grid.block_size)
        codes = encode(blocks / grid.factors(part).unsqueeze(-1), kind)
        packed[part] = pack_bits(codes.reshape(-1, cols), kind.bits)

    each_piece(work, rows, cols, w.device)
    return packed


def decode_blocks(
    codes: UInt8[Tensor, "rows cols"], grid: FloatGrid, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "rows cols"]:
    """Values of the codes, computed in float32 and rounded once to `dtype`."""
    rows, cols = codes.shape
    out = torch.empty(rows, cols, dtype=dtype, device=codes.device)

    def work(part: slice) -> None:
        elements = decode(codes[part], ELEMENTS[grid.element]).reshape(-1, cols // grid.block_size, grid.block_size)
        out[part] = elements.mul_(grid.factors(part).unsqueeze(-1)).reshape(-1, cols)

    each_piece(work, rows, cols, codes.device)
    return out


def _best_scale(blocks: Tensor, peak: Tensor, grid: FloatGrid, tries: tuple[float, ...]) -> Tensor:
    """Stored scales [rows, blocks]; `peak` is the largest magnitude of each block."""
    kind = ELEMENTS[grid.element]
    if grid.scale_kind == "e8m0":
        usual = power_of_two((exponent_of(peak) - kind.highest).clamp_(*_E8M0_RANGE))
    else:
        usual = peak / kind.largest
    usual = usual.where(peak > 0, 1.0)
    chosen = _stored(usual, grid)
    if len(tries) == 1:
        return chosen
    least = torch.full_like(peak, torch.inf)
    for factor in tries:
        trial = _stored(usual * factor, grid)
        step = _numbers(trial, grid.scale_kind, grid.tensor_scale)
        position = blocks / step.unsqueeze(-1)
        lost = rounded(position, kind).sub_(position).square_().sum(-1) * (step / usual).square_()
        chosen = torch.where(lost < least, trial, chosen)
        least = torch.minimum(lost, least)
    return chosen


def _stored(scale: Tensor, grid: FloatGrid) -> Tensor:
    """The nearest scale that can be stored, never zero."""
    if grid.scale_kind == "e8m0":
        return (exponent_of(scale).clamp_(*_E8M0_RANGE) + _E8M0_BIAS).to(torch.uint8)
    if grid.scale_kind == "e4m3":
        assert grid.tensor_scale is not None
        return encode(scale / grid.tensor_scale, _E4M3).clamp_(min=1)
    return stored_scale(scale, grid.scale.dtype).to(grid.scale.dtype)


def _numbers(stored: Tensor, kind: str, tensor_scale: Tensor | None) -> Tensor:
    """What stored scales stand for, float32."""
    if kind == "e8m0":
        return power_of_two(stored.int() - _E8M0_BIAS)
    if kind == "e4m3":
        assert tensor_scale is not None
        return decode(stored, _E4M3) * tensor_scale.float()
    return stored.float()


def _tensor_scale(w: Tensor, element: str) -> Tensor:
    """The factor, float32 [1], with which the largest e4m3 scale puts the largest entry onto the largest element."""
    low, high = torch.aminmax(w)
    peak = torch.maximum(-low, high).float().reshape(1)
    scale = (peak / (ELEMENTS[element].largest * _E4M3.largest)).clamp(min=torch.finfo(torch.float32).tiny)
    return scale.where(peak > 0, 1.0)

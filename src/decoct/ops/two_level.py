"""Uniform grids for small groups whose scales are quantized themselves (arXiv 2306.03078, its second level)."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from decoct.ops.grid import Grid
from decoct.ops.parallel import each_piece


@dataclass(frozen=True, slots=True)
class Scales:
    """Scales of one matrix: base + code * step, where a block of rows shares base and step of each group.

    Attributes:
        codes: uint8 [rows, groups].
        base: [blocks, groups], in the dtype that is stored.
        step: as `base`.
        bits: of the codes.
        rows_per_block: consecutive rows; the last block may have fewer.
    """

    codes: UInt8[Tensor, "rows groups"]
    base: Float[Tensor, "blocks groups"]
    step: Float[Tensor, "blocks groups"]
    bits: int
    rows_per_block: int

    def values(self) -> Float[Tensor, "rows groups"]:
        """The scales, float32."""
        block = torch.arange(self.codes.shape[0], device=self.codes.device) // self.rows_per_block
        return torch.addcmul(self.base[block].float(), self.step[block].float(), self.codes.float())


def span(
    w: Float[Tensor, "rows groups size"], used: Bool[Tensor, "rows groups size"]
) -> tuple[Float[Tensor, "rows groups"], Float[Tensor, "rows groups"]]:
    """Least and largest entry of each group among those that are used, widened to contain zero."""
    low, high = torch.where(used, w, 0).aminmax(dim=-1)  # an unused entry counts as zero, which is contained anyway
    return low.clamp(max=0), high.clamp(min=0)


def fit_two_level(
    w: Float[Tensor, "rows cols"],
    used: Bool[Tensor, "rows cols"],
    importance: Float[Tensor, " cols"],
    *,
    bits: int,
    group_size: int,
    scale_bits: int,
    rows_per_block: int,
    scale_dtype: torch.dtype,
) -> tuple[Grid, Scales]:
    """Choose each block's base and step, then each group's scale code and zero point.

    Base and step span the scales that would cover each group's extremes. Every code is then tried for every group, with
    the zero point that centres the grid on the group's span, and the one with the least Σ importance·(w - ŵ)² is kept.

    Args:
        w: float32.
        used: entries that the grid has to serve: no outliers, nothing pruned.
        importance: of each column.
        bits: 2 to 8.
        group_size: divides `cols`.
        scale_bits: 1 to 8.
        rows_per_block: rows that share base and step.
        scale_dtype: in which those are stored.

    Returns:
        A grid with float32 scales and zero points, and how its scales are made.

    Raises:
        ValueError: weights that are not finite, or too large for `scale_dtype`.
    """
    rows, cols = w.shape
    groups, top = cols // group_size, 2**bits - 1
    low = torch.empty(rows, groups, device=w.device)
    high = torch.empty_like(low)

    def measure(part: slice) -> None:
        low[part], high[part] = span(_grouped(w[part], group_size), _grouped(used[part], group_size))

    each_piece(measure, rows, cols, w.device)
    if not (torch.isfinite(low).all() and torch.isfinite(high).all()):
        raise ValueError("the weights hold NaN or infinite values; the checkpoint is damaged")
    base, step = _second_level(high / top - low / top, scale_bits, rows_per_block, scale_dtype)
    codes = torch.zeros(rows, groups, dtype=torch.uint8, device=w.device)
    zero = torch.zeros_like(codes)

    def choose(part: slice) -> None:
        block = torch.arange(part.start, part.stop, device=w.device) // rows_per_block
        weight = torch.where(_grouped(used[part], group_size), importance.reshape(groups, group_size), 0)
        trials = [torch.add(base[block].float(), step[block].float(), alpha=code) for code in range(2**scale_bits)]
        codes[part], zero[part] = _best(_grouped(w[part], group_size), weight, low[part] + high[part], trials, top)

    each_piece(choose, rows, cols, w.device)
    scales = Scales(codes, base, step, scale_bits, rows_per_block)
    return Grid(scales.values(), zero, bits, group_size), scales


def _second_level(
    scale: Float[Tensor, "rows groups"], bits: int, rows_per_block: int, dtype: torch.dtype
) -> tuple[Float[Tensor, "blocks groups"], Float[Tensor, "blocks groups"]]:
    """Base and step that span each block's scales; groups of zeros, which any scale serves, do not count."""
    padding = (0, 0, 0, -scale.shape[0] % rows_per_block)
    blocks = torch.nn.functional.pad(scale, padding).reshape(-1, rows_per_block, scale.shape[1])
    least = torch.where(blocks > 0, blocks, torch.inf).amin(1)
    largest = blocks.amax(1)
    limits = torch.finfo(dtype)
    base = torch.where(largest > 0, least, 1.0).clamp(min=limits.smallest_normal * limits.eps).to(dtype)
    step = ((largest - base.float()) / (2**bits - 1)).clamp(min=0).to(dtype)
    if not (torch.isfinite(base).all() and torch.isfinite(step).all()):
        raise ValueError(f"the weights are too large for scales in {dtype}; the checkpoint is damaged")
    return base, step


def _best(
    values: Tensor, weight: Tensor, ends: Tensor, trials: list[Tensor], top: int
) -> tuple[UInt8[Tensor, "rows groups"], UInt8[Tensor, "rows groups"]]:
    """The number of the best trial scale of each group, and its zero point; `ends` is least plus largest entry."""
    least = torch.full_like(ends, torch.inf)
    codes = torch.zeros_like(ends, dtype=torch.uint8)
    zero = torch.zeros_like(codes)
    for code, scale in enumerate(trials):
        middle = ends.div(-scale).add_(top).div_(2).round_().clamp_(0, top)
        loss = _loss(values, weight, scale.unsqueeze(-1), middle.unsqueeze(-1), top)
        better = loss < least
        least = torch.where(better, loss, least)
        codes.masked_fill_(better, code)
        zero = torch.where(better, middle.to(torch.uint8), zero)
    return codes, zero


def _loss(values: Tensor, weight: Tensor, scale: Tensor, zero: Tensor, top: int) -> Tensor:
    """Weighted squared error of each group [rows, groups]."""
    step = values.div(scale).round_().add_(zero).clamp_(0, top).sub_(zero)
    return step.mul_(scale).sub_(values).square_().mul_(weight).sum(-1)


def _grouped(x: Tensor, group_size: int) -> Tensor:
    return x.reshape(x.shape[0], -1, group_size)

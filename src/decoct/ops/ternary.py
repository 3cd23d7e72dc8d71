"""Scales for values of {-1, 0, 1}: a weight becomes ±scale where that is nearer than zero, else zero."""

import torch
from jaxtyping import Bool, Float, Int8
from torch import Tensor

from decoct.ops.parallel import each_piece

FITS = ("optimal", "absmean")
"""Ways of choosing a scale. `optimal`: least (weighted) squared error. `absmean`: the mean of |w| (BitNet b1.58)."""


def fit_ternary(
    w: Float[Tensor, "rows cols"],
    *,
    group_size: int,
    fit: str = "optimal",
    scale_dtype: torch.dtype = torch.float16,
    importance: Float[Tensor, " cols"] | None = None,
    mask: Bool[Tensor, "rows cols"] | None = None,
) -> Float[Tensor, "rows groups"]:
    """Choose the scale of each row's groups.

    `optimal` minimises Σ importance·(w - scale·t)² over the scale and t in {-1, 0, 1} exactly: for any scale the best
    t is ±1 where |w| exceeds half of it, so the weights that become ±1 are the largest k; with S and N the sums of
    importance·|w| and of importance over them, the scale is S/N and the error falls by S²/N; every k is tried. That
    is what TWN (arXiv 1605.04711) approximates by the threshold 0.7·mean|w|.

    Args:
        w: any float dtype.
        group_size: consecutive columns that share a scale; divides them.
        fit: one of FITS.
        scale_dtype: the dtype that scales are stored in.
        importance: of each column, for `optimal`; uniform if None.
        mask: False for weights that are gone: `absmean` leaves them out of its mean.

    Returns:
        The scales as they are stored, never zero: a group of zeros gets 1.

    Raises:
        ValueError: weights that are not finite, or too large for `scale_dtype`.
    """
    rows, cols = w.shape
    groups = cols // group_size
    scale = torch.empty(rows, groups, dtype=scale_dtype, device=w.device)
    weight = torch.ones(cols, device=w.device)
    if importance is not None:
        weight = importance.float() / importance.float().max().clamp(min=torch.finfo(torch.float32).tiny)

    def work(part: slice) -> None:
        size = w[part].float().abs().reshape(-1, groups, group_size)
        if fit == "absmean":
            count = float(group_size) if mask is None else mask[part].reshape(size.shape).sum(-1).clamp(min=1)
            found = (size / group_size).sum(-1) * (group_size / count)  # divided first: the sum must not overflow
        else:
            found = _optimal(size, weight.reshape(groups, group_size))
        scale[part] = stored(found, scale_dtype)

    each_piece(work, rows, cols, w.device)
    if not torch.isfinite(scale).all():
        raise ValueError(f"the weights are not finite or too large for scales in {scale_dtype}; check the checkpoint")
    return scale


def round_ternary(w: Float[Tensor, "rows cols"], scale: Float[Tensor, "rows groups"]) -> Int8[Tensor, "rows cols"]:
    """The nearest of {-1, 0, 1} times its group's scale."""
    grouped = w.float().reshape(w.shape[0], scale.shape[1], -1)
    return (grouped / scale.float().unsqueeze(-1)).round_().clamp_(-1, 1).to(torch.int8).reshape(w.shape)


def stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Round scales to the dtype that stores them, never to zero; a scale of exactly zero becomes 1."""
    limits = torch.finfo(dtype)
    size = torch.where(scale == 0, torch.ones_like(scale), scale.abs())
    return size.clamp(min=limits.smallest_normal * limits.eps).copysign(scale).to(dtype)


def _optimal(size: Float[Tensor, "rows groups n"], weight: Float[Tensor, "groups n"]) -> Float[Tensor, "rows groups"]:
    largest = size.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    ordered, index = (size / largest).sort(dim=-1, descending=True, stable=True)
    weights = weight.expand_as(size).gather(-1, index)
    total, count = (ordered * weights).cumsum(-1), weights.cumsum(-1).clamp(min=torch.finfo(torch.float32).tiny)
    best = (total.square() / count).argmax(-1, keepdim=True)
    scale: Tensor = (total / count).gather(-1, best) * largest
    return scale.squeeze(-1)

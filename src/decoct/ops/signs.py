"""What binary weights are fitted with: mean sizes, two sizes, the entries that matter most."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

_TINY = torch.finfo(torch.float32).tiny
_EMPTY = 1e-12  # of a row's weight: what a difference of sums may leave of nothing


def group_mean(
    size: Float[Tensor, "rows cols"], group_size: int, weight: Float[Tensor, "rows cols"]
) -> Float[Tensor, "rows groups"]:
    """Weighted means over groups of columns: of |w|, the scale with which signs lose least. 0 without any weight."""
    rows, cols = size.shape
    grouped = weight.reshape(rows, cols // group_size, group_size)
    share = grouped / grouped.sum(-1, keepdim=True).clamp(min=_TINY)  # at most 1: sums do not overflow
    return (size.reshape(grouped.shape) * share).sum(-1)


def largest_entries(score: Float[Tensor, "rows cols"], count: int) -> Bool[Tensor, "rows cols"]:
    """True for the `count` largest entries of the whole matrix; of equal ones the earlier."""
    found = torch.zeros(score.numel(), dtype=torch.bool, device=score.device)
    found[score.flatten().argsort(descending=True, stable=True)[:count]] = True
    return found.reshape(score.shape)


def finite_scale(scale: Float[Tensor, "*shape"], dtype: torch.dtype) -> Float[Tensor, "*shape"]:
    """Scales as they are stored.

    Raises:
        ValueError: they are not finite, or too large for `dtype`.
    """
    rounded = scale.to(dtype)
    if not torch.isfinite(rounded).all():
        raise ValueError(f"the weights are not finite or too large for scales in {dtype}; check the checkpoint")
    return rounded


def two_sizes(
    size: Float[Tensor, "rows n"], weight: Float[Tensor, "rows n"], splits: Float[Tensor, " k"] | None = None
) -> tuple[Float[Tensor, "rows 2"], Float[Tensor, ""] | None]:
    """Divide each row's sizes into small and large ones, so that their two means lose least squared error.

    With N, S the sums of weight and of weight·size over one part, its mean is S/N and takes S²/N off the error. Sorted
    once, cumulative sums give that for every split.

    Args:
        size: not negative.
        weight: of each entry's error; 0 leaves it out.
        splits: None: each row splits where it loses least. Otherwise all rows split at the same one of these sizes
            (what exceeds it is large), the one with the least error in all.

    Returns:
        The small and the large mean of each row (equal where one part is empty; 0 without any weight), and the split
        if it is shared.
    """
    largest = size.amax().clamp(min=_TINY)
    ordered, order = (size / largest).double().sort(dim=1, stable=True)
    weights = weight.double().gather(1, order)
    zero = torch.zeros_like(ordered[:, :1])
    count = torch.cat([zero, weights.cumsum(1)], 1)  # over the i smallest
    total = torch.cat([zero, (ordered * weights).cumsum(1)], 1)
    gain = total.square() / count.clamp(min=_TINY)
    gain += (total[:, -1:] - total).square() / (count[:, -1:] - count).clamp(min=_TINY)
    if splits is None:
        shared, cut = None, gain.argmax(1, keepdim=True)
    else:
        cuts = torch.searchsorted(
            ordered, (splits / largest).double().expand(len(ordered), -1).contiguous(), right=True
        )
        best = gain.gather(1, cuts).sum(0).argmax()
        shared, cut = splits[best], cuts[:, best : best + 1]
    below, under = count.gather(1, cut), total.gather(1, cut)
    above, over = count[:, -1:] - below, total[:, -1:] - under
    mean = total[:, -1:] / count[:, -1:].clamp(min=_TINY)
    small = torch.where(below > 0, under / below.clamp(min=_TINY), mean)
    large = torch.where(above > _EMPTY * count[:, -1:], over / above.clamp(min=_TINY), small)
    return torch.cat([small, torch.maximum(large, small)], 1).float() * largest, shared


def residual_sizes(size: Float[Tensor, "rows n"], weight: Float[Tensor, "rows n"]) -> Float[Tensor, "rows 2"]:
    """What signs and the signs of what they lose give: the mean size less, and plus, the mean distance from it."""
    mean = group_mean(size, size.shape[1], weight)
    spread = group_mean((size - mean).abs(), size.shape[1], weight)
    return torch.cat([mean - spread, mean + spread], 1)


def residual_error(size: Float[Tensor, "rows n"], weight: Float[Tensor, "rows n"]) -> Float[Tensor, ""]:
    """Σ weight·(size - nearer of `residual_sizes`)² over all rows; 0 for no columns.

    With μ the mean size and δ the mean distance from it, a row loses Σ weight·(size - μ)² - δ²·Σ weight.
    """
    if size.shape[1] == 0:
        return size.new_zeros(())
    count = weight.sum(1, keepdim=True)
    mean = (weight * size).sum(1, keepdim=True) / count.clamp(min=_TINY)
    apart = (size - mean).abs_()
    weighted = apart * weight
    spread = weighted.sum(1, keepdim=True) / count.clamp(min=_TINY)
    return (weighted * apart).sum() - (spread.square() * count).sum()

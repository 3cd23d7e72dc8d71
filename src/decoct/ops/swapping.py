"""Swapping pruned weights for kept ones (arXiv 2310.08915), so that outputs keep their means."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def run_of(survivors: Bool[Tensor, "out in"]) -> int:
    """The shortest run of entries of which all have as many survivors, an N:M pattern; a row if there is none.

    Runs divide a row. Those of which nothing or everything survives are no pattern.
    """
    width = survivors.shape[1]
    for run in (run for run in range(2, width) if width % run == 0):
        counts = survivors.reshape(-1, run).sum(1)
        if 0 < int(counts[0]) < run and bool((counts == counts[0]).all()):
            return run
    return width


def swap(
    w: Float[Tensor, "out in"],
    original: Float[Tensor, "out in"],
    survivors: Bool[Tensor, "out in"],
    mean: Float[Tensor, "in"],
    variance: Float[Tensor, "in"],
    *,
    num_swaps: int,
    run: int,
) -> tuple[Float[Tensor, "out in"], Bool[Tensor, "out in"]]:
    """Values and survivors after swaps, as many survivors in each run as before.

    With e = Σ_j (original - w)_j·mean_j, what a row's output misses on average, each swap brings back the dropped entry
    whose part of e, relative to its input's variance, is largest, and drops the kept entry of least |w|·‖x‖ whose own
    part has the other sign. A row is done when its next swap would not lower its expected squared error
    e² + Σ_j (original - w)_j²·variance_j, which takes inputs to be independent.

    Args:
        w: float64, zero where nothing survives.
        original: float64, before pruning.
        survivors: True where an entry of `w` survives.
        mean: of each input feature, float64.
        variance: of each input feature, float64.
        num_swaps: of each row, at most.
        run: entries within which a swap must stay; divides a row.
    """
    w, survivors = w.clone(), survivors.clone()
    rows = torch.arange(w.shape[0])
    part, size = original * mean, (mean.square() + variance).sqrt()
    spread = variance.clamp(min=torch.finfo(torch.float64).tiny)
    missing = ((original - w) @ mean).unsqueeze(1)
    number = torch.arange(w.shape[1]) // run
    going = torch.ones(w.shape[0], dtype=torch.bool)
    for _ in range(num_swaps):
        sign = missing.sign()
        gain = (sign * part / spread).masked_fill(survivors, -torch.inf)
        gain, grown = gain.max(1)
        allowed = survivors & (number == number[grown].unsqueeze(1)) & (sign * w * mean < 0)
        cost, dropped = (w.abs() * size).masked_fill(~allowed, torch.inf).min(1)
        back, lost = original[rows, grown], w[rows, dropped]
        after = missing[:, 0] - back * mean[grown] + lost * mean[dropped]
        # What was dropped before, or changed, already errs by original - w; the entry that drops errs by all of it.
        apart = (original[rows, dropped].square() - (original[rows, dropped] - lost).square()) * variance[dropped]
        change = after.square() - missing[:, 0].square() + apart - back.square() * variance[grown]
        going &= (gain > 0) & torch.isfinite(cost) & (change < 0)
        if not going.any():
            break
        mine = rows[going]
        w[mine, grown[going]], w[mine, dropped[going]] = back[going], 0.0
        survivors[mine, grown[going]], survivors[mine, dropped[going]] = True, False
        missing[going, 0] = after[going]
    return w, survivors

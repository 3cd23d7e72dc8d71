"""Weighted k-means of each row of a matrix: dynamic programming over bins for the start, then Lloyd's steps.

In one dimension clusters are intervals of the sorted values, so a row is sorted once, and weight and mean of any
interval are differences of running sums. Lloyd's steps then cost next to nothing, but from the usual starts they end
far from the optimum: with 16 centers, at twice its error. So the start is found by dynamic programming, which is
optimal for intervals that begin and end at the edges of bins. The bins share out (density)^(1/3) evenly, which is how
the cells of the best quantizer lie (Panter and Dite), and a cell need not reach further than a few times its even
share: the work is the same for any number of centers.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from decoct.ops.parallel import each_piece

_BINS = 128  # at least; within about 0.2 % of the optimum's error for 16 centers
_REACH = 3  # even shares that one cell may cover
_ROWS, _FEWEST = 128, 16  # rows at a time: enough to outweigh a call's fixed cost ...
_CENTERS_AT_ONCE, _VALUES_AT_ONCE = 1 << 12, 1 << 19  # ... without filling memory
_STEPS = 100  # Lloyd's; most rows are done after ten


def weighted_kmeans(
    values: Float[Tensor, "rows n"], weights: Float[Tensor, "#rows n"], num_centers: int
) -> Float[Tensor, "rows centers"]:
    """For each row the centers, ascending, with the least Σ weights·(value - nearest center)², nearly.

    Args:
        values: any float dtype.
        weights: not negative; of every row, or one row for all. A row whose weights are all zero has them all equal.
        num_centers: at most 256.

    Returns:
        float32; each center lies between values of its row.

    Raises:
        ValueError: values or weights that are not finite.
    """
    if not (torch.isfinite(values).all() and torch.isfinite(weights).all()):
        raise ValueError(
            "the weights or input statistics hold NaN or infinite values; check model and calibration text"
        )
    rows, n = values.shape
    centers = torch.empty(rows, num_centers, device=values.device)
    at_once = max(_FEWEST, min(_ROWS, _CENTERS_AT_ONCE // num_centers, _VALUES_AT_ONCE // n))

    def work(part: slice) -> None:
        for start in range(part.start, part.stop, at_once):
            few = slice(start, min(start + at_once, part.stop))
            centers[few] = _fit(values[few], weights if weights.shape[0] == 1 else weights[few], num_centers)

    each_piece(work, rows, n, values.device)
    return centers


class _Sorted:
    """Some rows, sorted, with running sums: weight and moment of the first k values, for every k."""

    def __init__(self, values: Tensor, weights: Tensor) -> None:
        points, order = values.float().sort(dim=1)
        self.points = points.double()
        mass = weights.double().expand_as(order).gather(1, order)
        mass = torch.where(mass.sum(1, keepdim=True) > 0, mass, 1.0)
        self.mass = mass / mass.amax(1, keepdim=True)
        self.weight = _running(self.mass)
        self.moment = _running(self.mass * self.points)

    def means(self, edges: Int[Tensor, "rows cells+1"]) -> Float[Tensor, "rows cells"]:
        """The weighted mean of each cell; where it holds no weight, its first value."""
        weight = self.weight.gather(1, edges).diff(dim=1)
        mean = self.moment.gather(1, edges).diff(dim=1) / weight.clamp(min=torch.finfo(torch.float64).tiny)
        last = self.points.shape[1] - 1
        first = self.points.gather(1, edges[:, :-1].clamp(max=last))
        final = self.points.gather(1, (edges[:, 1:] - 1).clamp(min=0))
        # Differences of running sums have rounding errors; clamping keeps the centers in ascending order.
        return torch.where(weight > 0, mean.clamp(first, torch.maximum(first, final)), first)


def _fit(values: Tensor, weights: Tensor, num_centers: int) -> Tensor:
    rows, n = values.shape
    size = values.abs().amax(1, keepdim=True).float().clamp(min=torch.finfo(torch.float32).tiny)
    data = _Sorted(values / size, weights)
    bins = _bins(data, max(_BINS, 2 * num_centers))
    weight, moment = (running.gather(1, bins).T.contiguous() for running in (data.weight, data.moment))
    cells = _best_cells(weight, moment, num_centers)
    edges = bins.gather(1, cells)
    ends = torch.tensor([0, n], device=values.device).expand(rows, 2)
    for _ in range(_STEPS):
        centers = data.means(edges)
        middles = (centers[:, :-1] + centers[:, 1:]) / 2
        new = torch.cat([ends[:, :1], torch.searchsorted(data.points, middles), ends[:, 1:]], 1)
        if torch.equal(new, edges):
            break
        edges = new
    return data.means(edges).float() * size


def _bins(data: _Sorted, count: int) -> Int[Tensor, "rows bins+1"]:
    """Edges of bins with an even share of (density)^(1/3)·length, as numbers of the values below them."""
    half = data.points.diff(dim=1) / 2
    length = torch.nn.functional.pad(half, (0, 1)) + torch.nn.functional.pad(half, (1, 0))
    share = _running((data.mass * length.square()).float().pow(1 / 3))
    levels = torch.arange(1, count, device=share.device) / count
    inner = torch.searchsorted(share, share[:, -1:] * levels)
    return torch.nn.functional.pad(torch.nn.functional.pad(inner, (1, 0)), (0, 1), value=data.points.shape[1])


def _best_cells(
    weight: Float[Tensor, "edges rows"], moment: Float[Tensor, "edges rows"], num_cells: int
) -> Int[Tensor, "rows cells+1"]:
    """Which bins' edges bound the cells with the least squared error, given running sums at the edges.

    The error is Σ weight·value² - Σ moment²/weight over cells, so the second sum is maximised: the best for k cells up
    to an edge is the best for k - 1 cells up to an earlier edge, and the cell between.
    """
    last = weight.shape[0] - 1
    reach = min(last, -(-_REACH * last // num_cells))
    gains = [_gain(weight[d:] - weight[:-d], moment[d:] - moment[:-d]) for d in range(1, reach + 1)]
    best, trial = [_gain(weight, moment)], torch.empty_like(weight)
    for _ in range(num_cells - 1):
        before, now = best[-1], best[-1].clone()  # as good as before: with an empty cell
        for d, gain in enumerate(gains, start=1):
            torch.maximum(now[d:], torch.add(gain, before[:-d], out=trial[d:]), out=now[d:])
        best.append(now)
    edge = torch.full((1, weight.shape[1]), last, device=weight.device)
    found = [edge]
    back = torch.arange(reach + 1, device=weight.device).unsqueeze(1)
    for before in reversed(best[:-1]):
        start = (edge - back).clamp_(min=0)
        gain = _gain(weight.gather(0, edge) - weight.gather(0, start), moment.gather(0, edge) - moment.gather(0, start))
        edge = start.gather(0, (before.gather(0, start) + gain).argmax(0, keepdim=True))
        found.append(edge)
    found.append(torch.zeros_like(edge))
    return torch.cat(found[::-1]).T.contiguous()


def _gain(weight: Tensor, moment: Tensor) -> Tensor:
    """What one center for a cell saves of Σ weight·value²."""
    return moment.square().div_(weight.clamp(min=torch.finfo(torch.float64).tiny))


def _running(x: Float[Tensor, "rows n"]) -> Float[Tensor, "rows n+1"]:
    """Sums of the first 0, 1, 2 ... entries."""
    return torch.nn.functional.pad(x.cumsum(1), (1, 0))

"""Pruning, entry by entry in float64: what each method takes an entry to be worth, and which entries then drop."""

import math

import torch
from torch import Tensor

from tests.reference.gptq import Round, prepared
from tests.reference.grids import Matrix
from tests.reference.low_rank import cholesky
from tests.reference.wanda import norms

Mask = list[list[bool]]


def lowest_drop(score: Matrix, num_dropped: int, run: int, kept: Mask | None = None) -> Mask:
    """True for what survives; runs are consecutive entries in row order, ties drop the earlier one.

    What is not in `kept` drops first.
    """
    cols = len(score[0])
    flat = [
        -1.0 if kept is not None and not kept[i][j] else value
        for i, row in enumerate(score)
        for j, value in enumerate(row)
    ]
    alive = [kept is None or kept[k // cols][k % cols] for k in range(len(flat))]
    for start in range(0, len(flat), run):
        for _, k in sorted((flat[k], k) for k in range(start, start + run))[:num_dropped]:
            alive[k] = False
    return [alive[i * cols : (i + 1) * cols] for i in range(len(score))]


def magnitude(w: Matrix) -> Matrix:
    """|w|."""
    return [[abs(value) for value in row] for row in w]


def relative_importance(w: Matrix, x: Matrix, power: float) -> Matrix:
    """(|w_ij| / Σ_j |w_ij| + |w_ij| / Σ_i |w_ij|)·‖x_j‖^power; an empty row or column has no share to give."""
    rows = [sum(abs(value) for value in row) for row in w]
    cols = [sum(abs(row[j]) for row in w) for j in range(len(w[0]))]
    size = norms(x)
    return [
        [
            ((abs(v) / rows[i] if rows[i] else 0.0) + (abs(v) / cols[j] if cols[j] else 0.0)) * size[j] ** power
            for j, v in enumerate(row)
        ]
        for i, row in enumerate(w)
    ]


def saliency(w: Matrix, H: Matrix) -> Matrix:
    """½·H_jj·w², the second-order rise of the squared output error."""
    return [[0.5 * H[j][j] * value**2 for j, value in enumerate(row)] for row in w]


def sparsegpt(
    w: Tensor,
    H: Tensor,
    num_dropped: float,
    *,
    block: int,
    by_row: bool = False,
    damping: float = 0.01,
    rounded: Round | None = None,
) -> tuple[Tensor, Tensor]:
    """The paper's loop over columns, U the upper Cholesky factor of H⁻¹; the mask of a block is chosen at its start.

    Args:
        w: [out, in].
        H: [in, in].
        num_dropped: of each row's entries of a block, on average over rows unless `by_row`.
        block: consecutive features; m for an N:M pattern.
        by_row: each row drops as many.
        damping: of the mean diagonal.
        rounded: (column's values, its number) -> the values that survivors are rounded to; None: they are not.

    Returns:
        The matrix and what survives.
    """
    damped, _, dead = prepared(H.tolist(), damping, act_order=False)
    U = torch.tensor(cholesky(torch.linalg.inv(torch.tensor(damped, dtype=torch.float64)).tolist())).double().T
    w = w.double().masked_fill(torch.tensor(dead), 0.0)
    out = w.shape[0]
    alive = torch.ones(w.shape, dtype=torch.bool)
    for j in range(w.shape[1]):
        if j % block == 0:
            part = slice(j, j + block)
            score = (w[:, part] ** 2 / torch.diagonal(U)[part] ** 2).tolist()
            run = block if by_row else out * block
            alive[:, part] = torch.tensor(lowest_drop(score, round(num_dropped * run / block), run))
        value = w[:, j] if rounded is None else rounded(w[:, j], j)
        value = torch.where(alive[:, j], value, 0.0)
        error = (w[:, j] - value) / U[j, j]
        w[:, j + 1 :] -= error[:, None] * U[j, j + 1 :]
        w[:, j] = value
    return w, alive


def surgeon(w: Tensor, H: Tensor, num_dropped: int, run: int, kept: Mask | None = None) -> Mask:
    """Row by row, the weight whose removal costs least goes, all others being optimal: everything is solved anew.

    Args:
        w: [out, in].
        H: [in, in], damped.
        num_dropped: of each run; a run of more than a row takes the steps of all rows that cost least.
        run: entries of a row, a part of it, or of the whole matrix.
        kept: what earlier steps left.
    """
    out, width = w.shape
    steps = []
    for i in range(out):
        left, removed = list(range(width)), [0] * width
        for step in range(width):
            inverse = torch.linalg.inv(H[left][:, left])
            values = inverse @ (H @ w[i].double())[left]
            cost = {}
            for k, j in enumerate(left):
                if run >= width or removed[j // run] < num_dropped:
                    forced = kept is not None and not kept[i][j]
                    cost[j] = -1.0 if forced else float(values[k] ** 2 / inverse[k, k])
            if not cost:
                break
            gone = min(cost, key=lambda j: cost[j])
            if run < width:
                removed[gone // run] += 1
            left.remove(gone)
            steps.append((i, step, gone, cost[gone]))
    alive = [[kept is None or kept[i][j] for j in range(width)] for i in range(out)]
    if run > width:
        highest, ranked = [-1.0] * out, []
        for i, step, j, cost_of in steps:
            highest[i] = max(highest[i], cost_of)
            ranked.append((highest[i], i, step, j))
        taken = [(i, j) for _, i, _, j in sorted(ranked)[:num_dropped]]
    else:
        taken = [(i, j) for i, step, j, _ in steps if run < width or step < num_dropped]
    for i, j in taken:
        alive[i][j] = False
    return alive


def least_squares(w: Tensor, H: Tensor, alive: Mask) -> Tensor:
    """For each row, the values on its survivors that minimise (w - ŵ)·H·(w - ŵ)ᵀ."""
    found = torch.zeros(w.shape, dtype=torch.float64)
    for i, row in enumerate(alive):
        left = [j for j, survives in enumerate(row) if survives]
        if left:
            found[i, left] = torch.linalg.solve(H[left][:, left], (H @ w[i].double())[left])
    return found


def splitting(W: Tensor, H: Tensor, num_dropped: int, run: int, rho: float = 0.1, num_steps: int = 300) -> Tensor:
    """ALPS's search in the paper's layout and letters, with an inverse computed anew for every rho.

    Args:
        W: [in, out], scaled.
        H: [in, in], with a unit diagonal.
        num_dropped: of each run of `run` entries of Wᵀ, in row order.
        run: see num_dropped.
        rho: at the start.
        num_steps: at most.

    Returns:
        D, [in, out].
    """

    def best(M: Tensor) -> Tensor:
        return torch.tensor(lowest_drop(M.T.abs().tolist(), num_dropped, run)).T

    eye = torch.eye(H.shape[0], dtype=torch.float64)
    support = best(W)
    D, V, before = W * support, torch.zeros_like(W), support
    size, moved = int(support.sum()), False
    for step in range(1, num_steps + 1):
        B = torch.linalg.inv(H + rho * eye) @ (H @ W - V + rho * D)
        support = best(B + V / rho)
        D = (B + V / rho) * support
        V = V + rho * (B - D)
        if step % 3 == 0:
            change = int((support != before).sum())
            before = support
            if change == 0 and (moved or rho < 1e-4):
                break
            moved = moved or change > 0
            if change == 0:
                rho /= 5
            elif change > 0.1 * size:
                rho *= 1.3
            elif change > 0.005 * size:
                rho *= 1.2
            else:
                rho *= 1.1
    return D


def swaps(
    w: Matrix, original: Matrix, kept: Mask, mean: list[float], variance: list[float], run: int, most: int
) -> Mask:
    """DSnoT row by row, swap by swap; every expected squared error is summed anew."""

    def expected(row: list[float], target: list[float]) -> float:
        lost = [t - v for t, v in zip(target, row, strict=True)]
        shift = sum(e * mean[j] for j, e in enumerate(lost))
        return shift**2 + sum(e**2 * variance[j] for j, e in enumerate(lost))

    alive = [list(row) for row in kept]
    for i, start in enumerate(w):
        row, target = list(start), original[i]
        for _ in range(most):
            missing = sum((t - v) * mean[j] for j, (t, v) in enumerate(zip(target, row, strict=True)))
            sign = (missing > 0) - (missing < 0)
            gone = [j for j in range(len(row)) if not alive[i][j]]
            if not gone:
                break
            grow = max(gone, key=lambda j: sign * target[j] * mean[j] / variance[j])
            others = [
                j for j in range(len(row)) if alive[i][j] and j // run == grow // run and sign * row[j] * mean[j] < 0
            ]
            if sign * target[grow] * mean[grow] <= 0 or not others:
                break
            drop = min(others, key=lambda j: abs(row[j]) * math.sqrt(mean[j] ** 2 + variance[j]))
            tried = list(row)
            tried[grow], tried[drop] = target[grow], 0.0
            if expected(tried, target) >= expected(row, target):
                break
            row, alive[i][grow], alive[i][drop] = tried, True, False
    return alive

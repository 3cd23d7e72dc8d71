"""GPTQ in float64, twice: as optimal brain quantization by elimination, and as the paper's loop over columns.

Both take the grid as given (static groups) and eliminate features in the same fixed order.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from tests.reference.grids import Grids, Matrix
from tests.reference.low_rank import cholesky

Round = Callable[[Tensor, int], Tensor]


def prepared(H: Matrix, damping: float, act_order: bool) -> tuple[Matrix, list[int], list[bool]]:
    """H with dead features given the live ones' mean H_jj (1 if there are none) and the damping added, and more.

    That is the order of elimination, and which features are dead.
    """
    n = len(H)
    dead = [H[j][j] == 0 for j in range(n)]
    live = [H[j][j] for j in range(n) if not dead[j]]
    stand_in = sum(live) / len(live) if live else 1.0
    H = [[stand_in if i == j and dead[j] else H[i][j] for j in range(n)] for i in range(n)]
    order = sorted(range(n), key=lambda j: -H[j][j]) if act_order else list(range(n))
    added = damping * sum(H[j][j] for j in range(n)) / n
    return [[H[i][j] + added * (i == j) for j in range(n)] for i in range(n)], order, dead


def inverse(A: Matrix) -> Matrix:
    """Gauss-Jordan elimination; A is positive definite, so no pivoting is needed."""
    n = len(A)
    rows = [[*row, *(float(i == j) for j in range(n))] for i, row in enumerate(A)]
    for k in range(n):
        pivot = rows[k][k]
        rows[k] = [v / pivot for v in rows[k]]
        for i in range(n):
            if i != k and rows[i][k]:
                factor = rows[i][k]
                rows[i] = [v - factor * p for v, p in zip(rows[i], rows[k], strict=True)]
    return [row[n:] for row in rows]


def obq(
    w: Matrix,
    H: Matrix,
    grids: Grids,
    *,
    mask: list[list[bool]] | None = None,
    damping: float = 0.01,
    act_order: bool = True,
    moved: Matrix | None = None,
) -> list[list[int]]:
    """Codes by optimal brain quantization: round a feature, spread its error over the rest with H⁻¹, eliminate it.

    e = (w_j - q_j)/[H⁻¹]_jj; w -= e·[H⁻¹]_j; H⁻¹ -= [H⁻¹]_·j·[H⁻¹]_j·/[H⁻¹]_jj.
    GPTAQ, with moved = E[(x' - x)·xᵀ]: the rest then takes up w_j·moved_j too: w += w_j·moved_j·H⁻¹ over the rest.
    """
    H, order, dead = prepared(H, damping, act_order)
    inv = inverse(H)
    w = [[0.0 if dead[j] else value for j, value in enumerate(row)] for row in w]
    codes = [[0] * len(row) for row in w]
    for step, j in enumerate(order):
        rest = order[step + 1 :]
        for i, row in enumerate(w):
            survives = mask is None or mask[i][j]
            codes[i][j] = grids.code(row[j], i, j) if survives else int(grids.at(i, j)[1])
            error = (row[j] - grids.value(codes[i][j], i, j)) / inv[j][j]
            for k in rest:
                row[k] -= error * inv[j][k]
        for a in rest:
            factor = inv[a][j] / inv[j][j]
            for b in rest:
                inv[a][b] -= factor * inv[j][b]
        if moved is not None:
            owed = {k: sum(moved[j][m] * inv[m][k] for m in rest) for k in rest}
            for row in w:
                for k in rest:
                    row[k] += row[j] * owed[k]
    return codes


def column_loop(w: Tensor, H: Tensor, rounded: Round, *, damping: float = 0.01, act_order: bool = True) -> Tensor:
    """The quantized matrix by the paper's loop: U the upper Cholesky factor of H⁻¹, one column after another.

    Args:
        w: [out, in].
        H: [in, in].
        rounded: (column's values, its original number) -> the values that they are rounded to.
        damping: as in the paper.
        act_order: as in the paper.
    """
    damped, order, dead = prepared(H.tolist(), damping, act_order)
    permuted = torch.tensor(damped, dtype=torch.float64)[order][:, order]
    U = torch.tensor(cholesky(torch.linalg.inv(permuted).tolist()), dtype=torch.float64).T
    w = w.double().masked_fill(torch.tensor(dead), 0.0)[:, order].clone()
    out = torch.empty_like(w)
    for j, original in enumerate(order):
        q = rounded(w[:, j], original)
        error = (w[:, j] - q) / U[j, j]
        w[:, j + 1 :] -= error[:, None] * U[j, j + 1 :]
        out[:, original] = q
    return out

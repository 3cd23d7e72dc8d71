"""Scales by least squares: given signs or trits, the scales with the least output error."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

_AT_ONCE = 1 << 22  # entries of the normal equations of the rows that are solved together
_RIDGE = 1e-4  # of an equation's own weight: scales that the inputs hardly tell apart stay where they were


def refit_scales(
    w: Float[Tensor, "out in"],
    H: Float[Tensor, "in in"],
    units: Sequence[Shaped[Tensor, "out in"]],
    scales: Sequence[Float[Tensor, "out groups"]],
    index: Int[Tensor, "in"],
) -> list[Float[Tensor, "out groups"]]:
    """For each row, the scales that minimise (w - ŵ)·H·(w - ŵ)ᵀ with ŵ_j = Σ_p unit_pj · scale_p,group(j).

    Args:
        w: the row's target, float32.
        H: symmetric positive semidefinite.
        units: what each plane's scales multiply: signs, trits.
        scales: the planes' scales as they are; what the data do not determine stays near them.
        index: the group of each column, in [0, groups).

    Returns:
        New scales, float32. They may be negative.
    """
    rows, groups = scales[0].shape
    unknowns = groups * len(units)
    order = index.argsort(stable=True)
    edges = [0, *torch.bincount(index, minlength=groups).cumsum(0).tolist()]
    sorted_H = H[order]  # rows by group; its columns stay as they are
    indicator = torch.nn.functional.one_hot(index, groups).to(H.dtype)
    found = torch.empty(rows, unknowns, device=w.device)
    step = max(1, _AT_ONCE // unknowns**2)
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        planes = [unit[part].float() for unit in units]
        normal = torch.empty(part.stop - start, unknowns, unknowns, device=w.device)
        seen = w[part] @ H
        for p, plane in enumerate(planes):
            by_group = plane[:, order]
            for group in range(groups):
                columns = slice(edges[group], edges[group + 1])
                outputs = by_group[:, columns] @ sorted_H[columns]
                for q, other in enumerate(planes):
                    block = slice(q * groups, (q + 1) * groups)
                    normal[:, p * groups + group, block] = (outputs * other) @ indicator
        wanted = torch.cat([(seen * plane) @ indicator for plane in planes], 1)
        found[part] = _solve(normal, wanted, torch.cat([scale[part].float() for scale in scales], 1))
    return list(torch.split(found, groups, dim=1))


def _solve(
    normal: Float[Tensor, "rows n n"], wanted: Float[Tensor, "rows n"], before: Float[Tensor, "rows n"]
) -> Float[Tensor, "rows n"]:
    """Solve for the change from `before`; unknowns that no input reaches do not change."""
    A, b, x = normal.double(), wanted.double().unsqueeze(-1), before.double().unsqueeze(-1)
    diagonal = torch.diagonal(A, dim1=1, dim2=2)
    typical = diagonal.mean(-1, keepdim=True)
    diagonal += _RIDGE * diagonal + torch.where(typical > 0, 1e-9 * typical, 1.0)
    change, info = torch.linalg.solve_ex(A, b - normal.double() @ x)
    solved = (info == 0) & torch.isfinite(change).all(1).squeeze(-1)
    return (x + torch.where(solved[:, None, None], change, 0.0)).squeeze(-1).float()

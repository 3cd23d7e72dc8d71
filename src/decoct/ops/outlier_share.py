"""OWL (arXiv 2310.05175): blocks with more outlying weights keep more of them."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

TIMES = 5.0
"""A weight is outlying if |w|·‖x‖ is above so many times its matrix's mean."""


def outlier_share(
    matrices: Sequence[Float[Tensor, "out in"]], norms: Sequence[Float[Tensor, " in"]], times: float = TIMES
) -> float:
    """Fraction of a block's weights that are outlying, each in its own matrix.

    Args:
        matrices: of the block.
        norms: of each matrix's input features, up to a common factor.
        times: see TIMES.
    """
    outlying, entries = 0, 0
    for w, norm in zip(matrices, norms, strict=True):
        score = w.float().abs() * norm.float()
        outlying += int((score > times * score.mean()).sum())
        entries += w.numel()
    return outlying / entries


def spread_sparsities(shares: Sequence[float], sparsity: float, spread: float) -> list[float]:
    """Each block's sparsity: on average `sparsity`, lower the more outlying weights a block has.

    Shares are scaled to [0, 2·spread], and what each has above their mean is kept more than 1 - sparsity.

    Args:
        shares: of outlying weights, by block.
        sparsity: the average.
        spread: λ; no two sparsities lie further apart than 2·λ.
    """
    found = torch.tensor(shares, dtype=torch.float64)
    width = float(found.max() - found.min())
    if width == 0.0:
        return [sparsity] * len(shares)
    scaled = (found - found.min()) / width * (2.0 * spread)
    return [sparsity - each for each in (scaled - scaled.mean()).tolist()]

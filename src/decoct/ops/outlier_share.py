"""OWL (arXiv 2310.05175): blocks with more outlying weights keep more of them."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

TIMES = 5.0
"""A weight is outlying if |w|·‖x‖ is above so many times the block's mean."""


def outlier_share(
    matrices: Sequence[Float[Tensor, "out in"]], norms: Sequence[Float[Tensor, " in"]], times: float = TIMES
) -> float:
    """Fraction of a block's weights that are outlying: all its matrices' scores have one mean, as in the paper's code.

    Args:
        matrices: of the block.
        norms: of each matrix's input features, up to a factor that all matrices have in common.
        times: see TIMES.
    """
    pairs = list(zip(matrices, norms, strict=True))
    entries = sum(w.numel() for w in matrices)
    limit = times * sum(float(_scores(w, norm).sum(dtype=torch.float64)) for w, norm in pairs) / entries
    return sum(int((_scores(w, norm) > limit).sum()) for w, norm in pairs) / entries


def _scores(w: Float[Tensor, "out in"], norm: Float[Tensor, " in"]) -> Float[Tensor, "out in"]:
    """What each weight is worth to Wanda."""
    return w.float().abs() * norm.float()


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

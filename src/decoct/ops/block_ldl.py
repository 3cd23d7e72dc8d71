"""Rounding with linear feedback, some features at a time: BlockLDLQ (arXiv 2402.04396, section 4.1).

It is GPTQ's update for quantizers that round several features together.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

RoundGroup = Callable[[int, Float[Tensor, "group out"]], Float[Tensor, "group out"]]
"""Number of the first feature, what is wanted -> what it is rounded to."""


def block_ldlq(
    features: Float[Tensor, "in out"], upper: Float[Tensor, "in in"], group: int, rounded: RoundGroup
) -> Float[Tensor, "in out"]:
    """Round groups of features one after another, each after the errors of those before have been compensated in it.

    With U = upper, Uᵀ·U = H⁻¹ and E the errors of group b, the features after it change by -U[b, after]ᵀ·U[b, b]⁻ᵀ·E:
    what makes tr(E·H·Eᵀ) least if nothing else is rounded. Features are split in half recursively, so that nearly all
    of this is large matrix products.

    Args:
        features: the transposed matrix, float32; not changed.
        upper: triangular, as `inverse_factor` gives it.
        group: features that are rounded together; the last group may have fewer.
        rounded: the quantizer; is called with groups in order.

    Returns:
        what `rounded` returned, put together.
    """
    wanted = features.clone()
    found, errors = torch.empty_like(wanted), torch.empty_like(wanted)

    def run(start: int, stop: int) -> None:
        if stop - start <= group:
            found[start:stop] = rounded(start, wanted[start:stop])
            lost = wanted[start:stop] - found[start:stop]
            errors[start:stop] = torch.linalg.solve_triangular(upper[start:stop, start:stop].T, lost, upper=False)
            return
        middle = start + -(-(stop - start) // (2 * group)) * group
        run(start, middle)
        wanted[middle:stop].addmm_(upper[start:middle, middle:stop].T, errors[start:middle], alpha=-1.0)
        run(middle, stop)

    run(0, features.shape[0])
    return found

"""Error feedback from block to block: scales chosen anew for each block from what its features have become.

`ops.feedback` rounds feature by feature to scales that are fixed beforehand. Here a block of consecutive features is
handed over whole, after it has taken up the errors of all blocks before it; whoever rounds it may look at all of it
first (BiLLM, arXiv 2402.04291, chooses salient features and groups that way).
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from decoct.ops.feedback import Elimination

BlockRounding = Callable[[int, Tensor, Elimination], Tensor]
"""(first feature, values [out, n], elimination within the block) -> what the values become, [out, n], float32.

The elimination is that of the block alone: `run` on it rounds the block's features one after another with feedback
among them, at no loss against eliminating them one by one in the whole matrix. Values are not to be changed.
"""


def feed_back_blocks(
    w: Float[Tensor, "out in"], elimination: Elimination, round_block: BlockRounding, block: int
) -> None:
    """Round blocks of features in turn; what a block lost, the features after it make up for as well as they can.

    With D the block's loss and U the factor of H⁻¹, the features after it change by -D·U_bb⁻¹·U_b,rest, whichever way
    the block itself was rounded. For a block of one feature that is GPTQ's update.

    Args:
        w: float32; not changed. Features that never fired count as zero.
        elimination: in the original order of features (`act_order` off), because blocks are consecutive features.
        round_block: called once for each block, in order; remembers what it stores.
        block: features in each; the last may have fewer.
    """
    values, U = w.masked_fill(elimination.dead, 0.0), elimination.upper
    count = w.shape[1]
    for start in range(0, count, block):
        stop = min(start + block, count)
        own = U[start:stop, start:stop]
        within = Elimination(
            torch.arange(stop - start, device=w.device), own, torch.zeros_like(elimination.dead[start:stop])
        )
        mine = values[:, start:stop].clone()
        lost = mine - round_block(start, mine, within)
        if stop < count:
            errors = torch.linalg.solve_triangular(own, lost, upper=True, left=False)
            values[:, stop:].addmm_(errors, U[start:stop, stop:], alpha=-1.0)

"""Norm tweaking (arXiv 2309.02784), in closed form: norms' gains make up for what compressing their readers lost."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from decoct.methods.base import GainRefit
from decoct.ops.channel_gain import channel_gains
from decoct.stats import PairedGram


@dataclass(frozen=True, slots=True, kw_only=True)
class NormTweaking(GainRefit):
    """Refit the gain of each norm so that what reads it comes as near as it can to the outputs that it had.

    The paper tunes the gains by gradient steps on a distance of the blocks' outputs. Here the target is that of the
    matrices that read the norm, so a least-squares solution for each norm is exact and costs one factorization.

    Attributes:
        alpha: which inputs the target is taken on: 0, those that the matrices have now, 1, those of the uncompressed
            model, which makes up for earlier blocks as well; between them a mixture.
        damping: what holds a gain where it was, as a fraction of how much the outputs depend on an average channel.
    """

    alpha: float = 0.5
    damping: float = 0.01

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must lie between 0 and 1, not {self.alpha}")
        if not 0 < self.damping <= 1:
            raise ValueError(f"damping must be above 0 and at most 1, not {self.damping}")

    @override
    def factors(
        self, readers: Sequence[Float[Tensor, "out in"]], wanted: Sequence[Float[Tensor, "out in"]], stat: PairedGram
    ) -> Float[Tensor, "in"]:
        H = stat.gram.full()
        found = channel_gains(readers, wanted, H, H + self.alpha * stat.cross, self.damping)
        if not torch.isfinite(found).all():
            raise ValueError("the refitted gains are not finite; the checkpoint or the text is damaged")
        return found

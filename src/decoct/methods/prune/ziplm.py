"""ZipLM (arXiv 2302.04089): structured OBS, the neuron or head whose loss the others make up for best goes next."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from decoct.methods.width import Channels, Narrowed, WidthMethod
from decoct.ops.structured_obs import removal_order
from decoct.stats import Gram


@dataclass(frozen=True, slots=True, kw_only=True)
class ZipLM(WidthMethod):
    """Chooses with the same second-order statistics that the refit uses, so both minimise one error.

    Attributes:
        keep: see WidthMethod.
        keep_heads: see WidthMethod.
        reconstruct: see WidthMethod; what the method is about.
        bias: see WidthMethod.
        multiple_of: see WidthMethod.
        rounds: into how many rounds of an edge's removals are divided; scores are exact at the start of each.
    """

    rounds: int = 64

    scoring: ClassVar[frozenset[type[Any]]] = frozenset({Gram})

    def __post_init__(self) -> None:
        WidthMethod.__post_init__(self)
        if self.rounds < 1:
            raise ValueError(f"rounds must be at least 1, not {self.rounds}")
        if not self.reconstruct:
            raise ValueError("ziplm chooses what the rest can make up for; leave reconstruct on")

    @override
    def scores(self, channels: Channels) -> Float[Tensor, " units"]:
        """The error that taking out each unit alone would make."""
        return removal_order(channels.reader, channels.stats[Gram].matrix(), channels.unit, 1, 1).first_scores

    @override
    def narrow(self, channels: Channels, num_kept: int) -> Narrowed:
        """See WidthMethod."""
        num_gone = channels.num_units - num_kept
        found = removal_order(channels.reader, channels.stats[Gram].matrix(), channels.unit, num_gone, self.rounds)
        stays = torch.ones(channels.num_units, dtype=torch.bool)
        stays[found.gone] = False
        return self.refitted(channels, stays.nonzero()[:, 0])

"""Minitron (arXiv 2407.14679): neurons and heads that answer least to a calibration text go."""

from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from decoct.methods.width import Channels, Residual, WidthMethod
from decoct.stats import Moments


@dataclass(frozen=True, slots=True, kw_only=True)
class Minitron(WidthMethod):
    """By activations alone, forwards only. The paper then distils; see `WidthMethod` for what is done here instead."""

    scoring: ClassVar[frozenset[type[Any]]] = frozenset({Moments})

    @override
    def scores(self, channels: Channels) -> Float[Tensor, " units"]:
        """Mean size of what a neuron, or all of a head's channels, put out."""
        return channels.by_unit(channels.stats[Moments].mean_abs.float())

    @override
    def hidden_scores(self, residual: Residual) -> Float[Tensor, " channels"]:
        """Mean size of what the norms put out there, added up over all of them."""
        return residual.mean_abs.sum(0)

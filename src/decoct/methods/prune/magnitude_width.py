"""Magnitude of coupled weights (the baseline of LLM-Pruner, arXiv 2305.11627): neurons and heads of least weight go."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from decoct.methods.width import Channels, Residual, WidthMethod


@dataclass(frozen=True, slots=True, kw_only=True)
class MagnitudeWidth(WidthMethod):
    """Chooses without data: by the squares of all weights that a neuron or head has, in every matrix.

    Attributes:
        keep: see WidthMethod.
        keep_heads: see WidthMethod.
        keep_hidden: see WidthMethod; below 1 it takes some text to find how large what is left of the stream is.
        reconstruct: see WidthMethod; off, so that no data is needed at all.
        bias: see WidthMethod.
        multiple_of: see WidthMethod.
    """

    reconstruct: bool = False

    @override
    def scores(self, channels: Channels) -> Float[Tensor, " units"]:
        """Sum of squares; a row of keys or values that several query heads read counts once."""
        pairs = zip(channels.writers, channels.repeats, strict=True)
        rows = sum(writer.square().sum(1) / repeats for writer, repeats in pairs)
        return channels.by_unit(channels.reader.square().sum(0) + rows)

    @override
    def hidden_scores(self, residual: Residual) -> Float[Tensor, " channels"]:
        """Sum of squares of all that writes a channel, and of all that reads it, the norms' gains folded in."""
        return residual.written + (residual.read * residual.gains.square()).sum(0)

"""Magnitude of coupled weights (the baseline of LLM-Pruner, arXiv 2305.11627): neurons and heads of least weight go."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from decoct.methods.width import Channels, WidthMethod


@dataclass(frozen=True, slots=True, kw_only=True)
class MagnitudeWidth(WidthMethod):
    """Chooses without data: by the squares of all weights that a neuron or head has, in every matrix.

    Attributes:
        keep: see WidthMethod.
        keep_heads: see WidthMethod.
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

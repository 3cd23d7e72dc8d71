"""LLM-Pruner (arXiv 2305.11627): neurons and heads whose absence would change the loss least, by a Taylor expansion."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from decoct.methods.width import Channels, WidthMethod


@dataclass(frozen=True, slots=True, kw_only=True)
class LLMPruner(WidthMethod):
    """By gradients of the model's own log-likelihood, which a sweep back through all blocks finds first.

    With m a factor on a unit's outputs, 1 in the model and 0 without the unit, the loss changes by about
    ½·E[(∂loss/∂m)²]: the Fisher information, since the labels are drawn from the model's own predictions. The paper
    adds up |weight · gradient| on labelled text; the sum inside the square is the same for all matrices of a unit.
    See `WidthMethod` for the settings; the paper then heals by LoRA, here the matrix behind is refitted.
    """

    by_gradient: ClassVar[bool] = True

    @override
    def scores(self, channels: Channels) -> Float[Tensor, " units"]:
        """The Fisher information of each unit's factor."""
        assert channels.information is not None
        return channels.information

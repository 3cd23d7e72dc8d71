"""FLAP (arXiv 2312.11983): channels that hardly vary go; a bias takes the place of what they were on average."""

from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from decoct.methods.width import Channels, Residual, WidthMethod
from decoct.stats import Moments


@dataclass(frozen=True, slots=True, kw_only=True)
class FLAP(WidthMethod):
    """By fluctuation times weight. The paper lets every block lose another share; here shapes stay uniform.

    Attributes:
        keep: see WidthMethod.
        keep_heads: see WidthMethod.
        keep_hidden: see WidthMethod; not in the paper.
        reconstruct: see WidthMethod; off in the paper.
        bias: see WidthMethod; the paper's compensation, for neurons and heads alone. False for architectures without a
            place for it.
        multiple_of: see WidthMethod.
    """

    reconstruct: bool = False
    bias: bool = True

    scoring: ClassVar[frozenset[type[Any]]] = frozenset({Moments})

    @override
    def scores(self, channels: Channels) -> Float[Tensor, " units"]:
        """Var(x_j)·‖W_:j‖² of each channel."""
        variance = channels.stats[Moments].variance().float()
        return channels.by_unit(variance * channels.reader.square().sum(0))

    @override
    def hidden_scores(self, residual: Residual) -> Float[Tensor, " channels"]:
        """Var(x_j)·‖W_:j‖² of what each norm puts out and all that reads it, added up over the norms."""
        return (residual.variance * residual.read).sum(0)

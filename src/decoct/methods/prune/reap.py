"""REAP (Router-weighted Expert Activation Pruning, arXiv 2510.13999): experts that add least where they answer go."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from decoct.methods.experts import ExpertMethod, ExpertStat, check_finite


class GatedNorms(ExpertStat):
    """Σ g·‖f(x)‖ of each expert over the tokens that are sent to it, float64; g its gate, f(x) its answer.

    Attributes:
        total: [experts].
    """

    everywhere: ClassVar[bool] = False

    def __init__(self, num_experts: int, width: int) -> None:
        """Nothing seen yet."""
        super().__init__(num_experts, width)
        self.total = torch.zeros(num_experts, dtype=torch.float64)

    @override
    def add(self, expert: int, answers: Float[Tensor, "tokens hidden"], gates: Float[Tensor, " tokens"]) -> None:
        self.total[expert] += answers.float().norm(dim=-1).double() @ gates.double()

    @staticmethod
    @override
    def nbytes_for(num_experts: int, width: int) -> int:
        return 16 * num_experts

    def saliency(self) -> Float[Tensor, " experts"]:
        """The mean of g·‖f(x)‖; 0 where no token was sent."""
        return self.total / self.num_sent.clamp(min=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class REAP(ExpertMethod):
    """The experts that are left, and their router rows, stay as they are. See `ExpertMethod`."""

    stat: ClassVar[type[ExpertStat]] = GatedNorms

    @override
    def mixture(self, stat: ExpertStat, num_kept: int) -> Float[Tensor, "kept experts"]:
        """Rows of the identity, in the experts' own order; of equally salient experts the first stay."""
        assert isinstance(stat, GatedNorms)
        saliency = stat.saliency()
        check_finite(saliency)
        stay = torch.argsort(saliency, descending=True, stable=True)[:num_kept].sort().values
        return torch.eye(len(saliency), dtype=torch.float64)[stay]

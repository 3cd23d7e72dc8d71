"""HC-SMoE (arXiv 2410.08589): experts that answer alike, found by hierarchical clustering, are merged into one."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from decoct.methods.experts import ExpertMethod, ExpertStat, check_finite
from decoct.ops.clustering import Linkage, agglomerate


class MeanAnswers(ExpertStat):
    """Σ f(x) of each expert over all tokens, whoever they are sent to, float64.

    Attributes:
        total: [experts, hidden].
        num_tokens: [experts].
    """

    everywhere: ClassVar[bool] = True

    def __init__(self, num_experts: int, width: int) -> None:
        """Nothing seen yet."""
        super().__init__(num_experts, width)
        self.total = torch.zeros(num_experts, width, dtype=torch.float64)
        self.num_tokens = torch.zeros(num_experts, dtype=torch.int64)

    @override
    def add(self, expert: int, answers: Float[Tensor, "tokens hidden"], gates: Float[Tensor, " tokens"]) -> None:
        self.total[expert] += answers.sum(0, dtype=torch.float64)
        self.num_tokens[expert] += len(answers)

    @staticmethod
    @override
    def nbytes_for(num_experts: int, width: int) -> int:
        return 8 * num_experts * (width + 2)

    def mean(self) -> Float[Tensor, "experts hidden"]:
        """E[f(x)]."""
        return self.total / self.num_tokens.unsqueeze(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class HCSMoE(ExpertMethod):
    """Groups by mean answers; within a group experts weigh what share of the group's tokens is sent to them.

    Attributes:
        keep: see ExpertMethod.
        linkage: how far two groups are from each other: as their experts on average, the farthest, or the nearest.
    """

    linkage: Linkage = "average"

    stat: ClassVar[type[ExpertStat]] = MeanAnswers

    @override
    def mixture(self, stat: ExpertStat, num_kept: int) -> Float[Tensor, "kept experts"]:
        """Each group's shares; equal ones where no token came to any of the group."""
        assert isinstance(stat, MeanAnswers)
        mean = stat.mean()
        check_finite(mean)
        groups = agglomerate(
            torch.cdist(mean, mean, compute_mode="donot_use_mm_for_euclid_dist"), num_kept, self.linkage
        )
        member = torch.nn.functional.one_hot(groups, num_kept).T.double()
        shares = member * stat.num_sent
        starved = shares.sum(1, keepdim=True) == 0
        shares = torch.where(starved, member, shares)
        return shares / shares.sum(1, keepdim=True)

"""Relations of tokens (MiniLMv2, arXiv 2012.15828): how alike queries, keys or values are."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from decoct.losses.states import StateLoss


@dataclass(frozen=True, slots=True, kw_only=True)
class Relations(StateLoss):
    """KL of softmax(x xᵀ / √d) between teacher and student, for x the queries, keys or values; any widths.

    States are [batch, seq, width]: all heads' channels side by side. They are cut into `num_heads` of equal width on
    both sides, so the models' own numbers of heads may differ. A position's relations are to itself and those before.

    Attributes:
        of: what is compared.
        num_heads: relations for each position.
    """

    of: Literal["queries", "keys", "values"] = "values"
    num_heads: int = 8

    def __post_init__(self) -> None:
        super(Relations, self).__post_init__()
        if self.num_heads < 1:
            raise ValueError(f"num_heads must be at least 1, not {self.num_heads}")

    @override
    def maps(self, student_width: int, teacher_width: int, num_pairs: int) -> dict[str, Tensor]:
        return {}

    @override
    def errors(self, student: Tensor, teacher: Tensor, change: Tensor | None) -> Float[Tensor, "batch seq"]:
        own, wanted = self._relations(student), self._relations(teacher)
        return (wanted.exp() * (wanted - own)).sum(-1).mean(1)

    def _relations(self, x: Float[Tensor, "batch seq width"]) -> Float[Tensor, "batch heads seq seq"]:
        batch, length, width = x.shape
        if width % self.num_heads:
            raise ValueError(f"num_heads {self.num_heads} does not divide the width {width}; take a number that does")
        heads = x.reshape(batch, length, self.num_heads, -1).transpose(1, 2)
        scores = heads @ heads.transpose(-1, -2) / heads.shape[-1] ** 0.5
        later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        return torch.log_softmax(scores.masked_fill(later, -1e9), -1)

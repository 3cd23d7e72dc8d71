"""Universal logit distillation (ULD, arXiv 2402.12030): a teacher with another tokenizer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from decoct.losses.base import Slope, TokenLoss
from decoct.losses.chunks import at_labels
from decoct.losses.distribution import Distribution, Projected, Targets


@dataclass(frozen=True, slots=True, kw_only=True)
class ULD(TokenLoss):
    """Cross-entropy + weight · Σ |sorted teacher - sorted student|: probabilities compared by rank, not by token.

    The shorter vocabulary is filled up with zeros. Each token's whole vocabulary is sorted, so it is never parted.

    Attributes:
        weight: of the distance of sorted probabilities; the text's own tokens weigh 1.
    """

    weight: float = 1.5

    whole_vocabulary: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ValueError(f"weight must be positive, not {self.weight:g}; for labels alone take cross_entropy")

    @override
    def check_teacher(self, student: Projected, teacher: Targets) -> None:
        """Any vocabulary fits."""

    @override
    def measure(
        self,
        student: Distribution,
        teacher: Distribution | None,
        labels: Int[Tensor, " tokens"],
        parts: Sequence[slice],
    ) -> tuple[Float[Tensor, " tokens"], Slope]:
        assert teacher is not None
        (part,) = parts
        own = student.columns(part)
        q, order = own.exp().sort(-1, descending=True)
        p = teacher.columns(slice(None)).exp().sort(-1, descending=True).values
        shared = min(p.shape[1], q.shape[1])
        apart = q.clone()
        apart[:, :shared] -= p[:, :shared]
        left_over = p[:, shared:].sum(-1)  # nothing stands against these
        losses = self.weight * (apart.abs().sum(-1) + left_over) - at_labels(student, labels, parts)

        def slope(_: slice) -> Tensor:
            h = torch.empty_like(q).scatter_(1, order, apart.sign() * q)
            chances = own.exp()
            found = (h - chances * h.sum(-1, keepdim=True)).mul_(self.weight) + chances
            found[torch.arange(len(labels), device=labels.device), labels] -= 1.0
            return found

        return losses, slope

"""Universal logit distillation (ULD, arXiv 2402.12030): a teacher with another tokenizer."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from decoct.losses.base import Batch, Slope, SweptLoss
from decoct.losses.chunks import Work
from decoct.losses.distribution import Aligned, Distribution, Projected, Targets


@dataclass(frozen=True, slots=True, kw_only=True)
class ULD(SweptLoss):
    """Cross-entropy + weight · Σ |sorted teacher - sorted student|: probabilities compared by rank, not by token.

    The shorter vocabulary is filled up with zeros. Where the teacher has nothing to say, the cross-entropy alone
    counts. Each token's whole vocabulary is sorted, so it is never parted.

    Attributes:
        weight: of the distance of sorted probabilities; the text's own tokens weigh 1.
    """

    weight: float = 1.5

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ValueError(f"weight must be positive, not {self.weight:g}; for labels alone take cross_entropy")

    @override
    def check_teacher(self, student: Projected, teacher: Targets) -> None:
        """Any vocabulary fits."""

    @override
    def work(self, student: Projected, teacher: Targets | None, batch: Batch, at_once: int) -> Work:
        assert teacher is not None
        theirs = slice(0, teacher.vocab)
        counts = torch.full_like(batch.weights, self.weight)
        if isinstance(teacher, Aligned):
            counts = counts * teacher.known

        def measure(rows: Tensor, own: Distribution, parts: Sequence[slice]) -> tuple[Tensor, Slope]:
            wanted = teacher.rows(rows, [theirs]).columns(theirs)
            return _measured(own.columns(parts[0]), wanted, batch.labels[rows], counts[rows])

        return Work(measure, whole_vocabulary=True)


def _measured(
    own: Float[Tensor, "tokens vocab"],
    teacher: Float[Tensor, "tokens theirs"],
    labels: Int[Tensor, " tokens"],
    counts: Float[Tensor, " tokens"],
) -> tuple[Float[Tensor, " tokens"], Slope]:
    """Each token's loss and slope, from log-probabilities; `counts`: what the distance weighs for each."""
    rows = torch.arange(len(labels), device=labels.device)
    q, order = own.exp().sort(-1, descending=True)
    p = teacher.exp().sort(-1, descending=True).values
    shared = min(p.shape[1], q.shape[1])
    apart = q.clone()
    apart[:, :shared] -= p[:, :shared]
    left_over = p[:, shared:].sum(-1)  # nothing stands against these
    losses = counts * (apart.abs().sum(-1) + left_over) - own[rows, labels]

    def slope(_: slice) -> Tensor:
        h = torch.empty_like(q).scatter_(1, order, apart.sign() * q)
        chances = own.exp()
        found = (h - chances * h.sum(-1, keepdim=True)).mul_(counts[:, None]) + chances
        found[rows, labels] -= 1.0
        return found

    return losses, slope

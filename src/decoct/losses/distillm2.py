"""DistiLLM-2 (arXiv 2503.07067): the teacher's texts pull probabilities up, the student's own texts push them down."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from decoct.losses.base import Batch, Slope, SweptLoss, check_share, summed
from decoct.losses.chunks import Work, label_log_probs
from decoct.losses.distribution import Distribution, Projected, Targets

_EPS = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class DistiLLM2(SweptLoss):
    """Skew KL on the teacher's texts, skew reverse KL on the student's own; more skew where they are far apart.

    Give it batches of both kinds of text; which is which is `Batch.by_student`. A text's alpha is
    1 - (1 - alpha) · m / d within bounds, where d is by how much the model that wrote it finds it likelier than the
    other (mean probability of a token, geometric), and m the batch's mean of d over its kind.

    Attributes:
        alpha: the skew of a usual text, and the largest.
        least_alpha: the smallest.
        student_share: what texts of the student weigh; the paper lets it grow over the training.
    """

    alpha: float = 0.1
    least_alpha: float = 0.01
    student_share: float = 0.5

    def __post_init__(self) -> None:
        check_share(self.alpha, "alpha")
        check_share(self.student_share, "student_share")
        if not 0 < self.least_alpha <= self.alpha:
            raise ValueError(f"least_alpha must be positive and at most alpha, not {self.least_alpha:g}")

    @override
    def work(self, student: Projected, teacher: Targets | None, batch: Batch, at_once: int) -> Work:
        assert teacher is not None
        alphas = self.alphas(
            label_log_probs(student, batch.labels, at_once), label_log_probs(teacher, batch.labels, at_once), batch
        )

        def measure(rows: Tensor, own: Distribution, parts: Sequence[slice]) -> tuple[Tensor, Slope]:
            push = batch.by_student[rows][:, None]
            terms = partial(_terms, push=push, alpha=alphas[rows][:, None])
            factor = 2.0 * torch.where(push, self.student_share, 1.0 - self.student_share).to(alphas.dtype)
            losses, slope = summed(terms, own, teacher.rows(rows, parts), parts)
            return losses * factor[:, 0], lambda part: slope(part).mul_(factor)

        return Work(measure)

    def alphas(
        self, student: Float[Tensor, " tokens"], teacher: Float[Tensor, " tokens"], batch: Batch
    ) -> Float[Tensor, " tokens"]:
        """Each row's alpha, from both models' log-probabilities of the labels; one for all of a text's rows."""
        taught = (batch.weights > 0).to(student.dtype)
        count = int(batch.texts.max()) + 1
        empty = torch.zeros(count, dtype=student.dtype, device=student.device)
        sizes = empty.index_add(0, batch.texts, taught).clamp(min=1)
        own, wanted = ((empty.index_add(0, batch.texts, each * taught) / sizes).exp() for each in (student, teacher))
        by_student = empty.index_add(0, batch.texts, batch.by_student.to(student.dtype)) > 0
        apart = torch.where(by_student, own - wanted, wanted - own)
        found = torch.full_like(apart, self.alpha)
        for kind in (by_student, ~by_student):
            if bool(kind.any()):
                usual = apart[kind].mean()
                found[kind] = 1 - (1 - self.alpha) * usual / (apart[kind] + _EPS)
        return found.clamp(self.least_alpha, self.alpha)[batch.texts]


def _terms(teacher: Tensor, student: Tensor, *, push: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """Skew KL where a row is not pushed; where it is, skew reverse KL whose mixture is a constant."""
    p, q = teacher.exp(), student.exp()
    of_teacher = torch.where(push, 1 - alpha, alpha)
    mixture = torch.logaddexp(teacher + of_teacher.log(), student + (1 - of_teacher).log())
    up = p * (teacher - mixture)
    down = q * (student - mixture)
    h_up = (p * q).mul_(of_teacher - 1).mul_(torch.exp(-mixture))
    return torch.where(push, down, up), torch.where(push, down + q, h_up)

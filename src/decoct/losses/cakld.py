"""CAKLD (BitDistiller, arXiv 2402.10631): forward and reverse KL, weighed by how sure the teacher is of the text."""

from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from decoct.losses.base import Batch, Divergence, check_share
from decoct.losses.chunks import AT_ONCE, label_log_probs
from decoct.losses.distribution import Targets


@dataclass(frozen=True, slots=True, kw_only=True)
class CAKLD(Divergence):
    """c KL(student ‖ teacher) + (1 - c) KL(teacher ‖ student); c is how sure the teacher is of the text that is taught.

    Attributes:
        confidence: c, the mean probability that the teacher gives to the text's tokens (`confidence_of`); None: a stage
            that trains finds it once, before the first step; 0.5 where nobody did.
    """

    confidence: float | None = None

    def __post_init__(self) -> None:
        super(CAKLD, self).__post_init__()
        if self.confidence is not None:
            check_share(self.confidence, "confidence")

    @property
    @override
    def shares(self) -> tuple[float, float]:
        sure = 0.5 if self.confidence is None else self.confidence
        return 1 - sure, sure

    @override
    def terms(self, teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
        p, q = teacher.exp(), student.exp()
        apart = student - teacher
        unsure, sure = self.shares
        return (sure * q - unsure * p) * apart, sure * (q * apart + q) - unsure * p


def confidence_of(teacher: Targets, batch: Batch, at_once: int = AT_ONCE) -> float:
    """The mean probability that the teacher gives to a batch's taught tokens, to be averaged over the texts."""
    chances = label_log_probs(teacher, batch.labels, at_once).exp().double()
    weights = batch.weights.double()
    return float((chances * weights).sum() / weights.sum())

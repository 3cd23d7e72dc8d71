"""MiniLLM (arXiv 2306.08543): reverse KL of whole texts by policy gradient, on texts that the student wrote."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from decoct.losses.base import Batch, PredictionLoss
from decoct.losses.chunks import AT_ONCE, label_log_probs
from decoct.losses.cross_entropy import CrossEntropy
from decoct.losses.distribution import Projected, Targets
from decoct.losses.reverse_kl import ReverseKL


@dataclass(frozen=True, slots=True, kw_only=True)
class MiniLLM(PredictionLoss):
    """Reverse KL of each next token, plus what the token that was drawn means for the tokens after it.

    The first is exact over the vocabulary (the paper's single-step decomposition), the second a policy gradient whose
    reward is the mean of log(teacher / student) over the later tokens (its length normalisation). The value is a
    stand-in with the right gradient, not a divergence.

    Attributes:
        teacher_share: the teacher's share in the mixture that texts were drawn from; tokens are weighed by what the
            student alone would have drawn. 0: the student alone wrote them.
    """

    teacher_share: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.teacher_share < 1:
            raise ValueError(f"teacher_share must be at least 0 and less than 1, not {self.teacher_share:g}")

    @override
    def __call__(
        self, student: Projected, teacher: Targets | None, batch: Batch, at_once: int = AT_ONCE
    ) -> Float[Tensor, ""]:
        self.check(student, teacher, batch)
        assert teacher is not None
        if bool((batch.weights[~batch.by_student] != 0).any()):
            raise ValueError("minillm learns from texts that the student wrote; take samples of the student")
        own, wanted = (label_log_probs(model, batch.labels, at_once) for model in (student, teacher))
        weights = batch.weights * self.importance(own, wanted)
        single = ReverseKL()(student, teacher, batch.weighing(weights), at_once)
        later = weights * later_rewards(wanted - own, batch)
        return single + CrossEntropy()(student, None, batch.weighing(later), at_once)

    def importance(
        self, student: Float[Tensor, " tokens"], teacher: Float[Tensor, " tokens"]
    ) -> Float[Tensor, " tokens"]:
        """Student's probability of each label over that of the mixture, from both log-probabilities."""
        share = self.teacher_share
        return student.exp() / (share * teacher.exp() + (1 - share) * student.exp())


def later_rewards(rewards: Float[Tensor, " tokens"], batch: Batch) -> Float[Tensor, " tokens"]:
    """For each taught row the mean of the rewards of the taught rows after it in its text; 0 for the last."""
    found = torch.zeros_like(rewards)
    for number in range(int(batch.texts.max()) + 1):
        rows = ((batch.texts == number) & (batch.weights != 0)).nonzero()[:, 0]
        after = rewards[rows].flip(0).cumsum(0).flip(0)[1:]
        counts = torch.arange(len(after), 0, -1, device=after.device)
        found[rows[:-1]] = after / counts
    return found

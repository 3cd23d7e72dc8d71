"""What every loss on predictions is: a frozen dataclass that measures some tokens, and says how logits should move."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import override

from decoct.losses.chunks import AT_ONCE, Work, row_losses, weighted_sum
from decoct.losses.compiled import Compiled
from decoct.losses.distribution import Distribution, Projected, Targets

Slope = Callable[[slice], Tensor]
"""The gradient of each token's loss by the student's logits, for a part of the vocabulary."""

Terms = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""For each entry, from the teacher's and the student's log-probability: a term, and its derivative by the latter."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What is known of a batch's tokens, beside the two models' predictions.

    A row stands for a position and is about the token that follows it.

    Attributes:
        labels: the token that follows; any where the weight is 0.
        weights: what each row counts; 0: not taught, as in prompts. Losses are sums over rows times weights.
        texts: the number of the text that each row belongs to, from 0; a text's rows stand in order.
        by_student: rows of texts that the student wrote.
    """

    labels: Int[Tensor, " tokens"]
    weights: Float[Tensor, " tokens"]
    texts: Int[Tensor, " tokens"]
    by_student: Bool[Tensor, " tokens"]

    @classmethod
    def of(
        cls,
        tokens: Int[Tensor, "texts length"],
        taught: Bool[Tensor, "texts length"] | None = None,
        by_student: Bool[Tensor, " texts"] | None = None,
    ) -> "Batch":
        """From token ids; every taught token weighs the same, all together 1.

        Args:
            tokens: the texts, padded at the end.
            taught: tokens that are learned: not those of prompts and padding; None: all. The first never is, for
                nothing predicts it.
            by_student: texts that the student wrote; None: none.

        Raises:
            ValueError: no token is taught.
        """
        count, length = tokens.shape
        mask = torch.ones_like(tokens, dtype=torch.bool) if taught is None else taught
        weights = torch.zeros(tokens.shape, dtype=torch.float32, device=tokens.device)
        weights[:, :-1] = mask[:, 1:].float()
        total = float(weights.sum())
        if total == 0:
            raise ValueError("no token of the batch is taught; give longer texts, or texts that are not all prompt")
        numbers = torch.arange(count, device=tokens.device).repeat_interleave(length)
        own = torch.zeros(count, dtype=torch.bool, device=tokens.device) if by_student is None else by_student
        return cls(tokens.roll(-1, 1).reshape(-1), (weights / total).reshape(-1), numbers, own[numbers])

    def weighing(self, weights: Float[Tensor, " tokens"]) -> "Batch":
        """The same with other weights."""
        return Batch(self.labels, weights, self.texts, self.by_student)


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictionLoss(ABC):
    """How far the student's next-token predictions are from what is wanted.

    Subclasses are frozen dataclasses whose fields are the loss's settings.
    """

    needs_teacher: ClassVar[bool] = True
    """Whether a teacher's predictions are wanted."""

    @abstractmethod
    def __call__(
        self, student: Projected, teacher: Targets | None, batch: Batch, at_once: int = AT_ONCE
    ) -> Float[Tensor, ""]:
        """The sum over rows of weight times loss, nats, differentiable by the student's states, matrix and bias.

        Args:
            student: its predictions.
            teacher: its predictions; None where the loss needs none.
            batch: labels and weights.
            at_once: entries of logits that are held at a time.

        Raises:
            ValueError: shapes that do not fit, a kind of teacher that the loss cannot learn from, or a loss that is
                not finite.
        """

    def check(self, student: Projected, teacher: Targets | None, batch: Batch) -> None:
        """Refuse what does not fit together; see `__call__`."""
        count = student.num_tokens
        if batch.weights.shape != (count,) or batch.labels.shape != (count,):
            raise ValueError(f"the batch has {batch.weights.shape[0]} rows, the student predicts {count}")
        if not self.needs_teacher:
            return
        if teacher is None:
            raise ValueError(f"{type(self).__name__} needs a teacher")
        if teacher.num_tokens != count:
            raise ValueError(f"the teacher predicts {teacher.num_tokens} tokens, the student {count}")
        self.check_teacher(student, teacher)

    def check_teacher(self, student: Projected, teacher: Targets) -> None:
        """Refuse a teacher whose predictions this loss cannot use.

        Raises:
            ValueError: another vocabulary, or not whole distributions.
        """
        if teacher.vocab != student.vocab:
            raise ValueError(
                f"the teacher's vocabulary has {teacher.vocab} entries, the student's {student.vocab}; "
                "for a teacher with another tokenizer take the loss uld"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class SweptLoss(PredictionLoss):
    """A loss that is measured, and its gradient found, in one sweep over chunks of tokens."""

    @override
    def __call__(
        self, student: Projected, teacher: Targets | None, batch: Batch, at_once: int = AT_ONCE
    ) -> Float[Tensor, ""]:
        self.check(student, teacher, batch)
        return weighted_sum(self.work(student, teacher, batch, at_once), student, batch.weights, at_once)

    def by_row(
        self, student: Projected, teacher: Targets | None, batch: Batch, at_once: int = AT_ONCE
    ) -> Float[Tensor, " tokens"]:
        """Each row's loss, without gradients; 0 where the weight is 0. Raises as `__call__`."""
        self.check(student, teacher, batch)
        return row_losses(self.work(student, teacher, batch, at_once), student, batch.weights, at_once)

    @abstractmethod
    def work(self, student: Projected, teacher: Targets | None, batch: Batch, at_once: int) -> Work:
        """What the sweep does with each chunk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLoss(SweptLoss):
    """A loss that looks at each token alone."""

    @override
    def work(self, student: Projected, teacher: Targets | None, batch: Batch, at_once: int) -> Work:
        def measure(rows: Tensor, student: Distribution, parts: Sequence[slice]) -> tuple[Tensor, Slope]:
            wanted = None if teacher is None else teacher.rows(rows, parts, self.softness)
            return self.measure(student, wanted, batch.labels[rows], parts)

        return Work(measure, self.softness, compiled=self.compiled(teacher, batch))

    def compiled(self, teacher: Targets | None, batch: Batch) -> Compiled | None:  # noqa: ARG002 - subclasses'
        """The loss as the compiled kernels know it; None: they do not."""
        return None

    @property
    def softness(self) -> float:
        """The temperature at which both models are compared."""
        return 1.0

    @abstractmethod
    def measure(
        self,
        student: Distribution,
        teacher: Distribution | None,
        labels: Int[Tensor, " tokens"],
        parts: Sequence[slice],
    ) -> tuple[Float[Tensor, " tokens"], Slope]:
        """Each token's loss, and its gradient by the student's logits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence(TokenLoss):
    """A sum over the vocabulary of a function of both log-probabilities.

    Attributes:
        temperature: both models' logits are divided by it, and the loss is multiplied with its square
            (arXiv 1503.02531), so that gradients keep their size.
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, not {self.temperature:g}")

    @property
    @override
    def softness(self) -> float:
        return self.temperature

    @property
    def shares(self) -> tuple[float, float] | None:
        """What forward and reverse KL weigh, where the loss is nothing but their sum; None: it is something else.

        Where they are given, the kernels compute the loss, and `terms` is not asked.
        """
        return None

    @override
    def compiled(self, teacher: Targets | None, batch: Batch) -> Compiled | None:
        if self.shares is None or not isinstance(teacher, Projected):
            return None
        return Compiled(teacher, batch.labels, self.shares, self.temperature)

    @abstractmethod
    def terms(
        self, teacher: Float[Tensor, "tokens part"], student: Float[Tensor, "tokens part"]
    ) -> tuple[Float[Tensor, "tokens part"], Float[Tensor, "tokens part"]]:
        """For each entry, from both log-probabilities: its term, and the term's derivative by the student's."""

    @override
    def measure(
        self,
        student: Distribution,
        teacher: Distribution | None,
        labels: Int[Tensor, " tokens"],
        parts: Sequence[slice],
    ) -> tuple[Float[Tensor, " tokens"], Slope]:
        assert teacher is not None
        return summed(self.terms, student, teacher, parts, self.temperature**2)


def summed(
    terms: Terms, student: Distribution, teacher: Distribution, parts: Sequence[slice], factor: float = 1.0
) -> tuple[Float[Tensor, " tokens"], Slope]:
    """For some tokens: the sum of terms over the vocabulary, times a factor, and its gradient by the logits."""
    held: Tensor | None = None
    losses: list[Tensor] = []
    totals: list[Tensor] = []
    for part in parts:
        term, held = terms(teacher.columns(part), student.columns(part))
        losses.append(term.sum(-1))
        totals.append(held.sum(-1, keepdim=True))
    total = torch.stack(totals).sum(0)

    def slope(part: slice) -> Tensor:
        """Through the softmax: h - softmax · (sum of h)."""
        own = student.columns(part)
        h = held if len(parts) == 1 and held is not None else terms(teacher.columns(part), own)[1]
        found = own.exp().mul_(-total).add_(h)
        return found if factor == 1.0 else found.mul_(factor)

    return torch.stack(losses).sum(0) * factor, slope


def check_share(value: float, name: str) -> None:
    """Refuse a setting that is no fraction.

    Raises:
        ValueError: it does not lie between 0 and 1, both excluded.
    """
    if not 0 < value < 1:
        raise ValueError(f"{name} must lie between 0 and 1, not {value:g}")

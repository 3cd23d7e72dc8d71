"""One text to learn from, and how several become a batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from decoct.losses import Batch


@dataclass(frozen=True, slots=True)
class Lesson:
    """A text in tokens.

    Attributes:
        tokens: prompt and answer.
        num_prompt: tokens of the prompt, which are read and not taught.
        by_student: whether the student wrote the answer.
        weight: what its tokens count.
    """

    tokens: tuple[int, ...]
    num_prompt: int = 0
    by_student: bool = False
    weight: float = 1.0

    def __post_init__(self) -> None:
        assert 0 <= self.num_prompt <= len(self.tokens)

    def cut(self, length: int) -> "Lesson":
        """Its first tokens."""
        return Lesson(self.tokens[:length], min(self.num_prompt, length), self.by_student, self.weight)


def collate(lessons: Sequence[Lesson], pad: int = 0) -> tuple[Int[Tensor, "texts length"], Batch]:
    """Texts of any lengths as one batch, padded at the end, where nothing is taught.

    Causal attention never looks ahead, so what stands in the padding does not matter.

    Raises:
        ValueError: nothing of them is taught.
    """
    length = max(len(lesson.tokens) for lesson in lessons)
    tokens = torch.full((len(lessons), length), pad, dtype=torch.long)
    taught: Bool[Tensor, "texts length"] = torch.zeros(len(lessons), length, dtype=torch.bool)
    for row, lesson in enumerate(lessons):
        tokens[row, : len(lesson.tokens)] = torch.tensor(lesson.tokens)
        taught[row, lesson.num_prompt : len(lesson.tokens)] = True
    batch = Batch.of(tokens, taught, torch.tensor([lesson.by_student for lesson in lessons]))
    weights = batch.weights * torch.tensor([lesson.weight for lesson in lessons])[batch.texts]
    return tokens, batch.weighing(weights / weights.sum())

"""What losses on inner states share: which blocks are compared, and learned maps where shapes differ."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

Maps = Mapping[str, Float[Tensor, "teacher student"]]
"""Learned matrices by the number of the pair of blocks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StateLoss(ABC):
    """How far what is inside the student is from what is inside the teacher, in some pairs of blocks.

    Attributes:
        num_pairs: blocks that are compared, spread evenly over both depths, the last ones among them.
    """

    num_pairs: int = 4

    def __post_init__(self) -> None:
        if self.num_pairs < 1:
            raise ValueError(f"num_pairs must be at least 1, not {self.num_pairs}")

    def pairs(self, student_blocks: int, teacher_blocks: int) -> list[tuple[int, int]]:
        """Which block of the student is compared with which of the teacher, by number, from 0."""
        count = min(self.num_pairs, student_blocks, teacher_blocks)
        return [((i + 1) * student_blocks // count - 1, (i + 1) * teacher_blocks // count - 1) for i in range(count)]

    def maps(self, student_width: int, teacher_width: int, num_pairs: int) -> dict[str, Tensor]:
        """First values of the matrices to learn beside the student; none where widths are equal.

        Args:
            student_width: of what is compared: hidden channels, or heads.
            teacher_width: the same.
            num_pairs: how many pairs there are.
        """
        if student_width == teacher_width:
            return {}
        return {str(pair): _spread(teacher_width, student_width) for pair in range(num_pairs)}

    def __call__(
        self,
        student: Sequence[Tensor],
        teacher: Sequence[Tensor],
        weights: Float[Tensor, "batch seq"],
        maps: Maps | None = None,
    ) -> Float[Tensor, ""]:
        """The mean over pairs of the sum over positions of weight times error, differentiable by student and maps.

        Args:
            student: of each pair's block, in order; shapes as the loss says.
            teacher: the same.
            weights: of each position; 0: not taught.
            maps: as `maps` gave them, trained meanwhile.

        Raises:
            ValueError: shapes that do not fit and no map between them, or a loss that is not finite.
        """
        if len(student) != len(teacher) or not student:
            raise ValueError(f"{len(student)} states of the student stand against {len(teacher)} of the teacher")
        found = [
            self._pair(own.float(), wanted.detach().float(), weights, (maps or {}).get(str(pair)))
            for pair, (own, wanted) in enumerate(zip(student, teacher, strict=True))
        ]
        total = torch.stack(found).mean()
        if not torch.isfinite(total.detach()):
            raise ValueError("the loss on inner states is not finite; lower the learning rate")
        return total

    def _pair(self, own: Tensor, wanted: Tensor, weights: Tensor, change: Tensor | None) -> Tensor:
        return (self.errors(own, wanted, change) * weights).sum()

    @abstractmethod
    def errors(self, student: Tensor, teacher: Tensor, change: Tensor | None) -> Float[Tensor, "batch seq"]:
        """Each position's error; `change` makes the teacher's width of the student's."""


def _spread(rows: int, columns: int) -> Tensor:
    """A matrix that copies channel for channel, again from the start where there are more rows than columns."""
    found = torch.zeros(rows, columns)
    found[torch.arange(rows), torch.arange(rows) % columns] = 1.0
    return found


def check_shapes(student: Tensor, teacher: Tensor, what: str) -> None:
    """Refuse what cannot be compared.

    Raises:
        ValueError: other shapes.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"{what} of the student have the shape {list(student.shape)}, the teacher's {list(teacher.shape)}; "
            "give the maps that were made for them"
        )

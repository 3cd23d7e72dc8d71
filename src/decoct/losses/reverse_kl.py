"""Reverse KL (as in MiniLLM, arXiv 2306.08543): the student keeps to what the teacher deems likely."""

from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from decoct.losses.base import Divergence


@dataclass(frozen=True, slots=True, kw_only=True)
class ReverseKL(Divergence):
    """KL(student ‖ teacher): keeps to what the teacher deems likely, and may leave some of it out."""

    @property
    @override
    def shares(self) -> tuple[float, float]:
        return 0.0, 1.0

    @override
    def terms(self, teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
        q = student.exp()
        term = (student - teacher).mul_(q)
        return term, q.add_(term)

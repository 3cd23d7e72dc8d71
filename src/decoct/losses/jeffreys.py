"""Jeffreys divergence, forward and reverse KL together (as compared in arXiv 2404.02657)."""

from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from decoct.losses.base import Divergence


@dataclass(frozen=True, slots=True, kw_only=True)
class Jeffreys(Divergence):
    """KL(teacher ‖ student) + KL(student ‖ teacher)."""

    @property
    @override
    def shares(self) -> tuple[float, float]:
        return 1.0, 1.0

    @override
    def terms(self, teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
        p, q = teacher.exp(), student.exp()
        apart = student - teacher
        term = (q - p).mul_(apart)
        return term, apart.add_(1.0).mul_(q).sub_(p)

"""Forward KL (Hinton et al., arXiv 1503.02531): the student covers everything that the teacher deems possible."""

from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from decoct.losses.base import Divergence


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardKL(Divergence):
    """KL(teacher ‖ student): covers everything that the teacher deems possible; the default."""

    @property
    @override
    def shares(self) -> tuple[float, float]:
        return 1.0, 0.0

    @override
    def terms(self, teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
        p = teacher.exp()
        return (teacher - student).mul_(p), p.neg_()

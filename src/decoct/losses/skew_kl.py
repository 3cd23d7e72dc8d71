"""Skew KL (DistiLLM, arXiv 2402.03898): forward KL from a mixture, whose gradients stay bounded."""

from dataclasses import dataclass
from math import log

import torch
from torch import Tensor
from typing_extensions import override

from decoct.losses.base import Divergence, check_share


@dataclass(frozen=True, slots=True, kw_only=True)
class SkewKL(Divergence):
    """KL(teacher ‖ a teacher + (1 - a) student): forward KL that no token's probability can make huge.

    Attributes:
        alpha: a, the teacher's share in the mixture.
    """

    alpha: float = 0.1

    def __post_init__(self) -> None:
        super(SkewKL, self).__post_init__()
        check_share(self.alpha, "alpha")

    @override
    def terms(self, teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
        p, q = teacher.exp(), student.exp()
        mixture = torch.logaddexp(teacher + log(self.alpha), student + log(1 - self.alpha))
        h = (p * q).mul_(self.alpha - 1).mul_(torch.exp(-mixture))
        return p * (teacher - mixture), h

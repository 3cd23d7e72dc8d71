"""Generalised Jensen-Shannon divergence (GKD, arXiv 2306.13649): between forward and reverse KL."""

from dataclasses import dataclass
from math import log

import torch
from torch import Tensor
from typing_extensions import override

from decoct.losses.base import Divergence, check_share


@dataclass(frozen=True, slots=True, kw_only=True)
class JSD(Divergence):
    """β KL(teacher ‖ m) + (1 - β) KL(student ‖ m) with the mixture m = β teacher + (1 - β) student; bounded.

    Divided by β it becomes forward KL where β goes to 0, divided by 1 - β reverse KL where β goes to 1.

    Attributes:
        beta: the teacher's share.
    """

    beta: float = 0.5

    def __post_init__(self) -> None:
        super(JSD, self).__post_init__()
        check_share(self.beta, "beta")

    @override
    def terms(self, teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
        p, q = teacher.exp(), student.exp()
        mixture = torch.logaddexp(teacher + log(self.beta), student + log(1 - self.beta))
        h = (1 - self.beta) * q * (student - mixture)
        return self.beta * p * (teacher - mixture) + h, h

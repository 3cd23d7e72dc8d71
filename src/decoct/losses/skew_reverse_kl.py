"""Skew reverse KL (DistiLLM, arXiv 2402.03898): reverse KL from a mixture, whose gradients stay bounded."""

from dataclasses import dataclass
from math import log

import torch
from torch import Tensor
from typing_extensions import override

from decoct.losses.base import Divergence, check_share


@dataclass(frozen=True, slots=True, kw_only=True)
class SkewReverseKL(Divergence):
    """KL(student ‖ (1 - a) teacher + a student): reverse KL that no token's probability can make huge.

    Attributes:
        alpha: a, the student's share in the mixture.
        detached: the mixture is a constant for the gradient, as in DistiLLM-2 (arXiv 2503.07067).
    """

    alpha: float = 0.1
    detached: bool = False

    def __post_init__(self) -> None:
        super(SkewReverseKL, self).__post_init__()
        check_share(self.alpha, "alpha")

    @override
    def terms(self, teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
        q = student.exp()
        mixture = torch.logaddexp(teacher + log(1 - self.alpha), student + log(self.alpha))
        term = q * (student - mixture)
        h = term + q
        if not self.detached:
            h -= (q * q).mul_(self.alpha).mul_(torch.exp(-mixture))
        return term, h

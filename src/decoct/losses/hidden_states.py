"""Hidden-state transfer (FitNets, arXiv 1412.6550; TinyBERT, arXiv 1909.10351): blocks imitate the teacher's."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from decoct.losses.states import StateLoss, check_shapes


@dataclass(frozen=True, slots=True, kw_only=True)
class HiddenStates(StateLoss):
    """Squared error of blocks' outputs, relative to the teacher's size; a learned matrix where widths differ.

    States are [batch, seq, width]. Worth it where depth or width changed much; else predictions alone teach better.
    """

    @override
    def errors(self, student: Tensor, teacher: Tensor, change: Tensor | None) -> Float[Tensor, "batch seq"]:
        own = student if change is None else student @ change.T.to(student.dtype)
        check_shapes(own, teacher, "hidden states")
        size = teacher.square().sum(-1).mean().clamp(min=1e-12)
        return (own - teacher).square().sum(-1) / size

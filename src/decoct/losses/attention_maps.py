"""Attention transfer (TinyBERT, arXiv 1909.10351): the student looks where the teacher looks."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from decoct.losses.states import StateLoss, check_shapes


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionMaps(StateLoss):
    """Squared error of attention probabilities, summed over keys, mean over heads; a learned mix where heads differ.

    Maps are [batch, heads, seq, keys], after the softmax. The mix gives each of the teacher's heads as a sum of the
    student's.
    """

    @override
    def errors(self, student: Tensor, teacher: Tensor, change: Tensor | None) -> Float[Tensor, "batch seq"]:
        own = student if change is None else torch.einsum("th,bhsk->btsk", change.to(student.dtype), student)
        check_shapes(own, teacher, "attention maps")
        return (own - teacher).square().sum(-1).mean(1)

"""Losses on predictions by the compiled kernels, and their gradients."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from decoct.native.library import FLOATS, TYPES, Divergence, library

FASTER = ("avx2", "avx512", "avx512bf16", "neon")
"""Levels whose kernels are faster than torch's operations one after the other; at others torch computes losses."""


def can_diverge(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `diverge` is there for logits of this dtype, on this device."""
    kernels = library()
    return kernels is not None and kernels.levels[-1] in FASTER and dtype in FLOATS and device.type == "cpu"


def diverge(
    student: Float[Tensor, "rows entries"],
    wanted: Float[Tensor, "rows entries"] | Int[Tensor, " rows"],
    *,
    scales: tuple[float, float] = (1.0, 1.0),
    shares: tuple[float, float] = (1.0, 0.0),
    weights: Float[Tensor, " rows"] | None = None,
) -> Float[Tensor, " rows"]:
    """Each row's loss (nats): KL divergences from a teacher's predictions, or cross-entropy with labels.

    Where `can_diverge` says so; contiguous.

    Args:
        student: logits, finite or -inf; overwritten with the gradient by them where weights are given.
        wanted: the teacher's logits, of the same dtype; or the entries that are right.
        scales: the student's and the teacher's logits are multiplied with these, both positive, first.
        shares: what KL(teacher ‖ student) and KL(student ‖ teacher) weigh; of no meaning for labels.
        weights: of rows in the gradient, float32; None: no gradient is wanted.

    Returns:
        Losses in float64, without their weights.
    """
    kernels = library()
    assert kernels is not None
    assert student.is_contiguous()
    assert wanted.is_contiguous()
    labels = wanted if wanted.dim() == 1 else None
    assert labels is not None or (wanted.shape == student.shape and wanted.dtype == student.dtype)
    if labels is not None:
        assert labels.dtype == torch.int64
        assert 0 <= int(labels.min()) <= int(labels.max()) < student.shape[1]
    assert weights is None or (weights.dtype == torch.float32 and weights.is_contiguous())
    losses = torch.empty(student.shape[0], dtype=torch.float64)
    kernels.diverge(
        Divergence(
            type=TYPES[student.dtype], rows=student.shape[0], entries=student.shape[1],
            student_scale=scales[0], teacher_scale=scales[1], forward=shares[0], reverse=shares[1],
            student=student.data_ptr(), teacher=None if labels is not None else wanted.data_ptr(),
            labels=None if labels is None else labels.data_ptr(),
            weights=None if weights is None else weights.data_ptr(), losses=losses.data_ptr(),
        )
    )  # fmt: skip
    return losses

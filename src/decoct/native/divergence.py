"""Losses on predictions by the compiled kernels, and their gradients."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from decoct.native.library import FLOATS, TYPES, Divergence, library

FASTER = ("avx2", "avx512", "avx512bf16", "neon")
"""Levels whose kernels are faster than torch's operations one after the other; at others torch computes losses."""

LEAST = -1e4
"""Log-probabilities are cut off here, as in native/predictions.h: a token that is ruled out gives zeros, not NaN."""


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

    Where `can_diverge` says so.

    Args:
        student: logits, finite or -inf; overwritten with the gradient by them where weights are given.
        wanted: the teacher's logits, of the same dtype; or the entries that are right.
        scales: the student's and the teacher's logits are multiplied with these, both positive, first.
        shares: what KL(teacher ‖ student) and KL(student ‖ teacher) weigh; of no meaning for labels.
        weights: of rows in the gradient, float32; None: no gradient is wanted.

    Returns:
        Losses in float64, without their weights.

    Raises:
        ValueError: shapes, dtypes, strides, devices or labels that do not fit.
    """
    kernels = library()
    assert kernels is not None
    labels = wanted if wanted.dim() == 1 else None
    _check(student, wanted, weights)
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


def _check(student: Tensor, wanted: Tensor, weights: Tensor | None) -> None:
    """The kernels read what they are pointed to."""
    rows, entries = student.shape
    given = [each for each in (student, wanted, weights) if each is not None]
    if not all(each.is_contiguous() and each.device.type == "cpu" for each in given):
        raise ValueError("logits, labels and weights have to be contiguous, and in the processor's memory")
    if student.dtype not in FLOATS or not entries:
        raise ValueError(f"no logits that the kernels know: {student.dtype} of shape {tuple(student.shape)}")
    if weights is not None and (weights.dtype != torch.float32 or weights.shape != (rows,)):
        raise ValueError(f"{rows} rows need as many float32 weights, not {weights.dtype} {tuple(weights.shape)}")
    logits = f"{student.dtype} {tuple(student.shape)}"
    if wanted.dim() > 1:
        if wanted.shape != student.shape or wanted.dtype != student.dtype:
            raise ValueError(f"the teacher's logits are {wanted.dtype} {tuple(wanted.shape)}, the student's {logits}")
    elif wanted.dtype != torch.int64 or wanted.shape != (rows,):
        raise ValueError(f"{rows} rows need as many int64 labels, not {wanted.dtype} {tuple(wanted.shape)}")
    elif rows and not 0 <= int(wanted.min()) <= int(wanted.max()) < entries:
        reach = f"{int(wanted.min())} to {int(wanted.max())}"
        raise ValueError(f"labels reach from {reach}, the vocabulary has {entries} entries")

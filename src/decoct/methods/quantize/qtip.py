"""QTIP (arXiv 2406.11235): rotate the matrix until it looks Gaussian, then round it to paths through a trellis."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from decoct.methods.base import LinearMethod, quantize_structure
from decoct.ops.block_ldl import block_ldlq
from decoct.ops.grid import stored_scale_dtype
from decoct.ops.hadamard import random_signs, rotate
from decoct.ops.linalg import inverse_factor
from decoct.ops.trellis import check_trellis, decode, encode, expected_error
from decoct.stats import Gram
from decoct.weights import Masked, Rotated, Sparse, Trellis, Weight
from decoct.weights.trellis import sequences_of

_STRIPE = 16  # columns rounded together, as in the paper; with 8 the error is 0.5 % less, and the search slower
_MOST_FEEDBACK = 0.75  # share of what is rounded that may be feedback before the estimate of it is not believed


@dataclass(frozen=True, slots=True, kw_only=True)
class QTIP(LinearMethod):
    """Trellis-coded quantization after incoherence processing, with the Gram matrix of the layer's inputs.

    Rows and columns are scaled and given random signs, both sides are Hadamard transformed, and groups of columns are
    rounded with BlockLDLQ, each to the shortest paths through a trellis. A weight costs `bits` bits; the scales cost 16
    bits for each row and column.

    Attributes:
        bits: 1 to 4.
        state_bits: a weight has 2**state_bits values to choose from, and choosing takes time in proportion. At least
            2·bits, at most 16.
        damping: fraction of the rotated Hessian's mean diagonal added to it; raised if the factorization fails.
        seed: of the signs.
    """

    bits: int = 2
    state_bits: int = 12
    damping: float = 0.01
    seed: int = 0

    stat: ClassVar[type[Gram]] = Gram

    def __post_init__(self) -> None:
        check_trellis(self.bits, self.state_bits)
        if not 0 < self.damping <= 1:
            raise ValueError(f"damping must be above 0 and at most 1, not {self.damping}")

    def workspace(self, shape: tuple[int, int]) -> int:
        """The matrix five times over, the Hessian, its factor and temporaries, and the search's distances."""
        return 20 * shape[0] * shape[1] + 28 * shape[1] ** 2 + (1 << 26)

    def operations(self, shape: tuple[int, int]) -> float:
        """Searching all states for each weight, pushing errors on, and the factorization."""
        out, cols = shape
        return 100.0 * (1 << self.state_bits) * out * cols + 2.0 * out * cols**2 + 2.0 * cols**3

    def compress(self, weight: Weight, stat: Gram) -> Weight:
        """Quantize a dense matrix, or both factors of a low-rank one.

        Raises:
            ValueError: a pruned weight (its zeros would not stay zero), or another that is not dense.
        """
        if any(isinstance(node, Sparse | Masked) for node in weight.walk()):
            raise ValueError(
                "qtip mixes all entries of a matrix, so pruned ones would not stay zero; use gptq for pruned matrices"
            )
        return quantize_structure(weight, stat, self._dense, "qtip")

    def _dense(self, w: Float[Tensor, "out in"], mask: Bool[Tensor, "out in"] | None, stat: Gram) -> Weight:
        assert mask is None
        H = stat.matrix()
        size = w.abs().max().float().clamp(min=torch.finfo(torch.float32).tiny)
        if not torch.isfinite(size):
            raise ValueError("the weights hold NaN or infinite values; the checkpoint is damaged")
        dead = torch.diagonal(H) == 0
        if dead.all():
            H = torch.eye(len(H))
        values = (w.float() / size).masked_fill(dead, 0.0)  # what no input reaches need not be kept
        dtype = stored_scale_dtype(w.dtype)
        left, right = (scale.to(dtype) for scale in incoherent_scales(values, torch.diagonal(H), self.seed))
        digits, unit = self._round(_divided(values, left, right), H * right.float()[:, None] * right.float())
        trellis = Trellis.of(
            digits,
            (w.shape[0], w.shape[1]),
            (unit * size).to(dtype),
            w.dtype,
            bits=self.bits,
            state_bits=self.state_bits,
            stripe=_STRIPE,
        )
        rough = Rotated.of(trellis, left, right).unpack(torch.float32) / size
        return Rotated.of(trellis, (left.float() * _least_squares(values, rough, H)).to(dtype), right)

    def _round(
        self, scaled: Float[Tensor, "out in"], H: Float[Tensor, "in in"]
    ) -> tuple[UInt8[Tensor, "stripes sequences length"], Float[Tensor, "1 1"]]:
        """Digits of the rotated matrix, and the size of its unit; H is scaled as the columns were."""
        rows, cols = scaled.shape
        H = rotate(H)
        upper = inverse_factor((H + H.T) / 2, self.damping).upper
        features = rotate(scaled).T.contiguous()
        unit = (features.square().mean().reshape(1, 1) / (1 - self._feedback(upper))).sqrt()
        unit = torch.where(unit > 0, unit, 1.0)
        count, length = sequences_of(rows * _STRIPE)
        digits = torch.zeros(-(-cols // _STRIPE), count, length, dtype=torch.uint8)

        def rounded(first: int, wanted: Float[Tensor, "group out"]) -> Float[Tensor, "group out"]:
            flat = (wanted / unit).reshape(-1)
            sequences = torch.nn.functional.pad(flat, (0, count * length - len(flat))).reshape(count, length)
            stripe = encode(sequences, self.bits, self.state_bits)
            digits[first // _STRIPE] = stripe
            values = decode(stripe, self.bits, self.state_bits)
            return values.reshape(-1)[: len(flat)].view_as(wanted) * unit

        block_ldlq(features, upper, _STRIPE, rounded)
        return digits, unit

    def _feedback(self, upper: Float[Tensor, "in in"]) -> Tensor:
        """About what share of the values that are rounded is feedback of errors: more, the more the inputs correlate.

        An error of unit size in feature i moves feature j by upper_ij / upper_ii. Feedback is uneven among features;
        room for twice the mean lost least in our measurements.
        """
        moved = upper.div(torch.diagonal(upper)[:, None]).square().sum() / len(upper) - 1
        return (2 * expected_error(self.bits) * moved).clamp(max=_MOST_FEEDBACK)


def incoherent_scales(
    w: Float[Tensor, "out in"], second_moment: Float[Tensor, " in"], seed: int
) -> tuple[Float[Tensor, " out"], Float[Tensor, " in"]]:
    """Signed scales of rows and columns by which the matrix is divided before it is rotated.

    A rotation spreads the error evenly over rows and over columns. Dividing each row by the root of its norm before
    makes the sum of squared errors least. For columns there are two answers: √‖w_j‖ / H_jj^¼ if errors are not fed back
    (QuIP, arXiv 2307.13304), and ‖w_j‖ if feedback makes up for all that it can. √‖w_j‖ / H_jj^⅛ lost less than either.

    Args:
        w: the matrix.
        second_moment: the Hessian's diagonal.
        seed: of the signs.
    """
    rows = torch.linalg.vector_norm(w, dim=1).sqrt()
    rows = rows / _positive(rows.mean())
    inputs = second_moment.clamp(min=1e-12 * second_moment.max())
    columns = torch.linalg.vector_norm(_divided(w, rows, torch.ones_like(inputs)), dim=0).sqrt() / inputs**0.125
    columns = columns / _positive(columns.mean())
    return rows * random_signs(len(rows), 2 * seed), columns * random_signs(len(columns), 2 * seed + 1)


def _positive(x: Tensor) -> Tensor:
    return torch.where(x == 0, 1.0, x)


def _divided(
    matrix: Float[Tensor, "out in"], left: Float[Tensor, " out"], right: Float[Tensor, " in"]
) -> Float[Tensor, "out in"]:
    """Rows divided by `left` and columns by `right`; where a scale is zero, so is the matrix."""
    return matrix / _positive(left.float())[:, None] / _positive(right.float())


def _least_squares(
    wanted: Float[Tensor, "out in"], found: Float[Tensor, "out in"], H: Float[Tensor, "in in"]
) -> Float[Tensor, " out"]:
    """The factor of each row of `found` that brings its outputs closest to what is wanted."""
    seen = found @ H
    fits, size = (seen * wanted).sum(1), (seen * found).sum(1)
    return torch.where(size > 0, fits / _positive(size), 1.0).clamp(0.8, 1.25)

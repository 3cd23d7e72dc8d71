"""AQLM (arXiv 2401.06118): neighbouring weights as a sum of learned vectors, one from each of a few codebooks."""

from dataclasses import dataclass
from math import prod
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from decoct.methods.base import LinearMethod, quantize_structure
from decoct.ops.additive import decode, feedback_codes, fit_codebooks, fit_rows, improve_codes
from decoct.ops.grid import stored_scale_dtype
from decoct.ops.linalg import inverse_factor
from decoct.ops.residual_kmeans import residual_kmeans
from decoct.stats import Gram
from decoct.weights import Additive, Masked, Sparse, Weight

_SAMPLES, _KMEANS_STEPS = 1 << 14, 10  # for the first codebooks; least squares moves them on anyway
_FIT_STEPS = 10  # of conjugate gradients, from the last codebooks on
_VECTORS_AN_ENTRY = 4  # at least: with fewer, codebooks would be a copy of the matrix
_SEARCH, _CLUSTERING = 200.0, 400.0  # measured, a distance, in operations of a matrix product that takes as long
_OTHER_DISTANCES = 10  # to all entries, that a search computes besides the beam's


class _Found(NamedTuple):
    """Codes, codebooks and scales as they are stored, and what is lost with them."""

    error: float
    codes: UInt8[Tensor, "books out n"]
    codebooks: Float[Tensor, "books entries d"]
    scale: Float[Tensor, "out 1"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AQLM(LinearMethod):
    """Additive quantization with the Gram matrix of the layer's inputs.

    Rows are divided by a scale. Each `vector` neighbouring weights of a row are a sum of entries of `num_codebooks`
    codebooks that the whole matrix shares. First codebooks come from k-means, first codes from rounding with feedback;
    then codebooks (by least squares), codes (by coordinate descent) and scales are improved in turn, and the best is
    kept. A weight costs num_codebooks · code_bits / vector bits; the codebooks cost 16 bits a value, a row's scale 16.

    Attributes:
        num_codebooks: 1 to 8.
        code_bits: 1 to 8; a codebook has 2**code_bits entries. Matrices with less than four vectors for each entry get
            smaller ones.
        vector: neighbouring weights that share codes, 1 to 32; must divide the input features.
        num_rounds: of improvement; 0 leaves what rounding with feedback found.
        beam: sums kept while the best is searched for: a power of two, at most 256. Time is about in proportion.
        damping: fraction of the Hessian's mean diagonal added to it; raised if the factorization fails.
        seed: of the first codebooks.
    """

    num_codebooks: int = 2
    code_bits: int = 8
    vector: int = 8
    num_rounds: int = 3
    beam: int = 16
    damping: float = 0.01
    seed: int = 0

    stat: ClassVar[type[Gram]] = Gram

    def __post_init__(self) -> None:
        for name, value, most in (("num_codebooks", self.num_codebooks, 8), ("code_bits", self.code_bits, 8)):
            if not 1 <= value <= most:
                raise ValueError(f"{name} must be 1 to {most}, not {value}")
        if not 1 <= self.vector <= 32:
            raise ValueError(f"vector is the number of weights that share codes, 1 to 32, not {self.vector}")
        if self.num_rounds < 0:
            raise ValueError(f"num_rounds must be at least 0, not {self.num_rounds}")
        if not 1 <= self.beam <= 256 or self.beam & (self.beam - 1):
            raise ValueError(f"beam must be a power of two, 1 to 256, not {self.beam}")
        if not 0 < self.damping <= 1:
            raise ValueError(f"damping must be above 0 and at most 1, not {self.damping}")

    def check(self, shape: tuple[int, int]) -> None:
        """The vectors must divide the input features."""
        cols = shape[1]
        if cols % self.vector:
            fitting = max(n for n in range(1, self.vector) if cols % n == 0)
            raise ValueError(f"vector {self.vector} does not divide {cols} input features; use {fitting}")

    def workspace(self, shape: tuple[int, int]) -> int:
        """Weights, features, errors and what is found in float32; the Hessian, its factor; distances."""
        return 32 * shape[0] * shape[1] + 24 * shape[1] ** 2 + (1 << 26)

    def operations(self, shape: tuple[int, int]) -> float:
        """Searches in every round, k-means, least squares, and the factorization."""
        out, cols = shape
        entries, vectors = 1 << self._bits(shape), out * cols / self.vector
        distances = entries * self.num_codebooks * (self.beam / 2 + _OTHER_DISTANCES)
        clustering = _CLUSTERING * min(_SAMPLES, vectors) * entries * self.num_codebooks * _KMEANS_STEPS
        products = 2.0 * out * cols**2 * (2 + self.num_rounds * (_FIT_STEPS + 4)) + 2.0 * cols**3
        return _SEARCH * vectors * distances * (1 + self.num_rounds) + clustering + products

    def compress(self, weight: Weight, stat: Gram) -> Weight:
        """Quantize a dense matrix, or both factors of a low-rank one.

        Raises:
            ValueError: a pruned weight (its zeros would not stay zero), or another that is not dense; a width that
                `vector` does not divide.
        """
        if any(isinstance(node, Sparse | Masked) for node in weight.walk()):
            raise ValueError(
                "aqlm rounds neighbouring weights together, so pruned ones would not stay zero; "
                "use gptq for pruned matrices"
            )
        return quantize_structure(weight, stat, self._dense, "aqlm")

    def _bits(self, shape: tuple[int, int]) -> int:
        """Bits of a code, given how many vectors there are to learn codebooks from."""
        entries = prod(shape) // (self.vector * _VECTORS_AN_ENTRY)
        return min(self.code_bits, max(1, entries.bit_length() - 1))

    def _dense(self, w: Float[Tensor, "out in"], mask: Bool[Tensor, "out in"] | None, stat: Gram) -> Weight:
        assert mask is None
        self.check((w.shape[0], w.shape[1]))
        H = stat.matrix()
        size = w.abs().max().float().clamp(min=torch.finfo(torch.float32).tiny)
        if not torch.isfinite(size):
            raise ValueError("the weights hold NaN or infinite values; the checkpoint is damaged")
        dead = torch.diagonal(H) == 0
        H = torch.eye(len(H)) if dead.all() else H / torch.diagonal(H).mean()
        upper, damping = inverse_factor(H, self.damping)
        torch.diagonal(H).add_(damping)
        values = (w.float() / size).masked_fill(dead, 0.0)  # what no input reaches must not widen the codebooks
        found = self._search(values, H, upper, size, stored_scale_dtype(w.dtype))
        return Additive.of(found.codes, found.codebooks, found.scale, w.dtype)

    def _search(
        self,
        values: Float[Tensor, "out in"],
        H: Float[Tensor, "in in"],
        upper: Float[Tensor, "in in"],
        size: Tensor,
        dtype: torch.dtype,
    ) -> _Found:
        """The best that rounds of improvement meet; whatever is stored is rounded before codes are chosen for it.

        Args:
            values: the matrix divided by `size`.
            H: positive definite.
            upper: Uᵀ·U = H⁻¹.
            size: of the largest weight.
            dtype: of codebooks and scales.
        """
        scale = (values.square().mean(1, keepdim=True).sqrt() * size).to(dtype)
        codebooks = self._first_codebooks(_divided(values, scale.float() / size), torch.diagonal(H)).to(dtype)
        codes = feedback_codes(_divided(values, scale.float() / size), upper, codebooks.float(), self.beam)
        best = None
        for number in range(self.num_rounds + 1):
            own = scale.float() / size
            wanted = _divided(values, own)
            if number > 0:
                codebooks = fit_codebooks(wanted, codes, codebooks.float(), H, own.square(), _FIT_STEPS).to(dtype)
                codes = improve_codes(wanted, codes, codebooks.float(), H, self.beam)
            found = decode(codes, codebooks.float())
            factor = fit_rows(wanted, found, H).clamp(0.5, 2.0)
            scale = (scale.float() * factor).to(dtype)
            lost = values - found * (scale.float() / size)
            error = float(((lost @ H) * lost).sum())
            if best is None or error < best.error:
                best = _Found(error, codes, codebooks, scale)
        assert best is not None
        return best

    def _first_codebooks(
        self, wanted: Float[Tensor, "out in"], importance: Float[Tensor, " in"]
    ) -> Float[Tensor, "books entries d"]:
        """Residual k-means on a sample of vectors, weighted by the Hessian's diagonal."""
        generator = torch.Generator().manual_seed(self.seed)
        vectors = wanted.reshape(-1, self.vector)
        drawn = torch.randperm(len(vectors), generator=generator)[:_SAMPLES]
        weights = importance.reshape(-1, self.vector)[drawn % (wanted.shape[1] // self.vector)]
        shape = (self.num_codebooks, 1 << self._bits((wanted.shape[0], wanted.shape[1])))
        return residual_kmeans(vectors[drawn], weights, shape, num_steps=_KMEANS_STEPS, generator=generator)


def _divided(values: Float[Tensor, "out in"], scale: Float[Tensor, "out 1"]) -> Float[Tensor, "out in"]:
    """Rows divided by their scales; where a scale is zero, so is the row."""
    return torch.where(scale > 0, values / torch.where(scale > 0, scale, 1.0), 0.0)

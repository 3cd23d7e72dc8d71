"""Statistics of a linear layer's inputs: accumulators that merge, so shards and resumed runs add up alike."""

from typing import ClassVar, Protocol, Self

import torch
from jaxtyping import Float
from torch import Tensor

from decoct.ops.hadamard import rotate
from decoct.ops.products import bf16_products

_SUMMED = 256  # tokens at a time whose squares are summed in float32: they stay in the cache
_TILE = 512  # Gram matrices are symmetric: tiles below the diagonal are mirrored, not computed


class Stat(Protocol):
    """What a method may ask for: start empty, add batches of inputs, merge with others of the same width."""

    @property
    def num_tokens(self) -> int:
        """How many inputs it holds."""

    @classmethod
    def empty(cls, width: int) -> Self:
        """No tokens seen, `width` input features."""

    @classmethod
    def neutral(cls, width: int) -> Self:
        """What featureless inputs would give: for a layer that no calibration token reached."""

    def add(self, x: Float[Tensor, "tokens in"]) -> None:
        """Take a batch of inputs into account."""

    def merge(self, other: Self) -> Self:
        """The statistic of both sets of tokens."""

    def through(self, right: Float[Tensor, "rank in"]) -> "Stat":
        """The statistic of right·x, for the left factor of a low-rank pair."""

    def scaled(self, factor: Float[Tensor, "in"]) -> Self:
        """The statistic of factor·x, feature by feature."""

    def rotated(self) -> Self:
        """The statistic of H·x, with H the orthonormal Hadamard transform."""

    @staticmethod
    def nbytes_for(width: int) -> int:
        """Bytes that one accumulator of this width takes; the planner counts with it."""


class Gram:
    """Σ x·xᵀ over tokens, float32: what GPTQ, SparseGPT, SVD-LLM and SliceGPT need.

    Attributes:
        total: [in, in], the plain sum; what lies below the diagonal need not be filled in, see `full`.
        num_tokens: how many inputs it holds.
    """

    name: ClassVar[str] = "gram"

    def __init__(self, total: Float[Tensor, "in in"], num_tokens: int) -> None:
        self.total = total
        self.num_tokens = num_tokens

    @classmethod
    def empty(cls, width: int) -> Self:
        """A sum over no tokens."""
        return cls(torch.zeros(width, width, dtype=torch.float32), 0)

    @classmethod
    def neutral(cls, width: int) -> Self:
        """What white inputs would give: for a layer that no calibration token reached."""
        return cls(torch.eye(width), 1)

    def add(self, x: Float[Tensor, "tokens in"]) -> None:
        """Add x·xᵀ of each token; bfloat16 inputs are multiplied as such where the CPU can, and summed in float32."""
        exact = x.dtype == torch.bfloat16
        values = x.float()
        with bf16_products(enabled=exact):
            for start in range(0, values.shape[1], _TILE):
                rows = values[:, start : start + _TILE].T
                self.total[start : start + _TILE, start:].addmm_(rows, values[:, start:])
        self.num_tokens += x.shape[0]

    def merge(self, other: Self) -> Self:
        """The sum over both sets of tokens."""
        return type(self)(self.total + other.total, self.num_tokens + other.num_tokens)

    def matrix(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "in in"]:
        """H = (2/N)·Σ x·xᵀ, symmetric, the Hessian of the squared output error (METHODS' notation).

        Raises:
            ValueError: no tokens were seen.
        """
        if self.num_tokens == 0:
            raise ValueError("no calibration token reached this layer")
        return self.full().to(dtype).mul_(2.0 / self.num_tokens)

    def full(self) -> Float[Tensor, "in in"]:
        """Σ x·xᵀ, symmetric; `total` holds only what lies on its diagonal and above."""
        upper = self.total.triu()
        return upper + upper.triu(1).T

    def through(self, right: Float[Tensor, "rank in"]) -> "Gram":
        """The statistic of right·x: what the left factor of a low-rank pair sees."""
        return Gram(right.float() @ self.full() @ right.float().T, self.num_tokens)

    def scaled(self, factor: Float[Tensor, "in"]) -> Self:
        """The statistic of factor·x."""
        return type(self)(self.total * factor * factor.unsqueeze(1), self.num_tokens)

    def rotated(self) -> Self:
        """The statistic of H·x."""
        return type(self)(rotate(self.full()), self.num_tokens)

    @staticmethod
    def nbytes_for(width: int) -> int:
        """Float32 [width, width]."""
        return 4 * width * width


class PairedGram:
    """Σ x·xᵀ and Σ (x' - x)·xᵀ, x' what the uncompressed model feeds into the same layer: GPTAQ's two streams.

    Attributes:
        gram: of x.
        cross: [in, in] float32, the second sum.
    """

    name: ClassVar[str] = "paired_gram"

    def __init__(self, gram: Gram, cross: Float[Tensor, "in in"]) -> None:
        self.gram = gram
        self.cross = cross

    @classmethod
    def empty(cls, width: int) -> Self:
        """Sums over no tokens."""
        return cls(Gram.empty(width), torch.zeros(width, width))

    @classmethod
    def neutral(cls, width: int) -> Self:
        """White inputs, the same in both models."""
        return cls(Gram.neutral(width), torch.zeros(width, width))

    @property
    def num_tokens(self) -> int:
        """How many inputs it holds."""
        return self.gram.num_tokens

    def add(self, x: Float[Tensor, "tokens in"]) -> None:
        """Inputs that are the same in both models: those of a model of which nothing is compressed yet."""
        self.gram.add(x)

    def add_pair(self, x: Float[Tensor, "tokens in"], original: Float[Tensor, "tokens in"]) -> None:
        """Add a batch of inputs, and of what the uncompressed model has in their place."""
        self.gram.add(x)
        self.cross.addmm_((original.float() - x.float()).T, x.float())

    def merge(self, other: Self) -> Self:
        """The sums over both sets of tokens."""
        return type(self)(self.gram.merge(other.gram), self.cross + other.cross)

    def through(self, right: Float[Tensor, "rank in"]) -> "PairedGram":
        """The statistic of right·x."""
        r = right.float()
        return PairedGram(self.gram.through(right), r @ self.cross @ r.T)

    def scaled(self, factor: Float[Tensor, "in"]) -> Self:
        """The statistic of factor·x."""
        return type(self)(self.gram.scaled(factor), self.cross * factor * factor.unsqueeze(1))

    def rotated(self) -> Self:
        """The statistic of H·x."""
        return type(self)(self.gram.rotated(), rotate(self.cross))

    @staticmethod
    def nbytes_for(width: int) -> int:
        """Two float32 [width, width]."""
        return 8 * width * width


class ColumnNorm:
    """Σ x² for each input feature, float64: Wanda's ‖X_j‖₂.

    Attributes:
        total: [in].
        num_tokens: how many inputs it holds.
    """

    name: ClassVar[str] = "column_norm"

    def __init__(self, total: Float[Tensor, "in"], num_tokens: int) -> None:
        self.total = total
        self.num_tokens = num_tokens

    @classmethod
    def empty(cls, width: int) -> Self:
        """A sum over no tokens."""
        return cls(torch.zeros(width, dtype=torch.float64), 0)

    @classmethod
    def neutral(cls, width: int) -> Self:
        """What white inputs would give."""
        return cls(torch.ones(width, dtype=torch.float64), 1)

    def add(self, x: Float[Tensor, "tokens in"]) -> None:
        """Add the squares."""
        for part in torch.split(
            x, _SUMMED
        ):  # a few in float32, which is fast, and those sums in float64, which is exact
            self.total += part.float().square().sum(0)
        self.num_tokens += x.shape[0]

    def merge(self, other: Self) -> Self:
        """The sum over both sets of tokens."""
        return type(self)(self.total + other.total, self.num_tokens + other.num_tokens)

    def norm(self) -> Float[Tensor, "in"]:
        """Root mean square of each input feature, float32.

        Raises:
            ValueError: no tokens were seen.
        """
        if self.num_tokens == 0:
            raise ValueError("no calibration token reached this layer")
        return (self.total / self.num_tokens).sqrt().float()

    def scaled(self, factor: Float[Tensor, "in"]) -> Self:
        """The statistic of factor·x."""
        return type(self)(self.total * factor.double().square(), self.num_tokens)

    def through(self, _: Float[Tensor, "rank in"]) -> "ColumnNorm":
        """Not to be had from norms alone.

        Raises:
            ValueError: always; a Gram would be needed.
        """
        raise ValueError("column norms cannot be carried through a low-rank factor; prune before factorizing")

    def rotated(self) -> Self:
        """Not to be had from norms alone.

        Raises:
            ValueError: always; a Gram would be needed.
        """
        raise ValueError("column norms cannot be carried through a rotation; leave this matrix out of `online`")

    @staticmethod
    def nbytes_for(width: int) -> int:
        """Float64 [width]."""
        return 8 * width


class AbsMax:
    """max |x| for each input feature, float32: SmoothQuant and activation scales.

    Attributes:
        maximum: [in].
        num_tokens: how many inputs it holds.
    """

    name: ClassVar[str] = "abs_max"

    def __init__(self, maximum: Float[Tensor, "in"], num_tokens: int) -> None:
        self.maximum = maximum
        self.num_tokens = num_tokens

    @classmethod
    def empty(cls, width: int) -> Self:
        """A maximum over no tokens: zero."""
        return cls(torch.zeros(width), 0)

    @classmethod
    def neutral(cls, width: int) -> Self:
        """Every feature alike."""
        return cls(torch.ones(width), 1)

    def add(self, x: Float[Tensor, "tokens in"]) -> None:
        """Raise the maxima."""
        if x.shape[0] == 0:
            return
        self.maximum = torch.maximum(self.maximum, x.abs().amax(0).float())
        self.num_tokens += x.shape[0]

    def merge(self, other: Self) -> Self:
        """The larger of both."""
        return type(self)(torch.maximum(self.maximum, other.maximum), self.num_tokens + other.num_tokens)

    def peak(self) -> Float[Tensor, "in"]:
        """The maxima, to choose scales from.

        Raises:
            ValueError: no tokens were seen, or inputs that are not finite.
        """
        if self.num_tokens == 0:
            raise ValueError("no calibration token reached this layer")
        if not torch.isfinite(self.maximum).all():
            raise ValueError("the inputs hold NaN or infinite values; the checkpoint or the text is damaged")
        return self.maximum

    def scaled(self, factor: Float[Tensor, "in"]) -> Self:
        """The statistic of factor·x."""
        return type(self)(self.maximum * factor.abs(), self.num_tokens)

    @staticmethod
    def nbytes_for(width: int) -> int:
        """Float32 [width]."""
        return 4 * width


class Moments:
    """Mean and variance of each input feature, float64, merged by Chan's formula: FLAP's fluctuation, AWQ's mean |x|.

    Attributes:
        mean: [in].
        mean_abs: [in], mean of |x|.
        deviation: [in], Σ (x - mean)².
        num_tokens: how many inputs it holds.
    """

    name: ClassVar[str] = "moments"

    def __init__(self, mean: Tensor, mean_abs: Tensor, deviation: Tensor, num_tokens: int) -> None:
        self.mean = mean
        self.mean_abs = mean_abs
        self.deviation = deviation
        self.num_tokens = num_tokens

    @classmethod
    def empty(cls, width: int) -> Self:
        """Moments of no tokens: zero."""
        zero = torch.zeros(width, dtype=torch.float64)
        return cls(zero, zero.clone(), zero.clone(), 0)

    @classmethod
    def neutral(cls, width: int) -> Self:
        """What white inputs would give."""
        one = torch.ones(width, dtype=torch.float64)
        return cls(torch.zeros_like(one), one.clone(), one, 1)

    def add(self, x: Float[Tensor, "tokens in"]) -> None:
        """Merge the moments of a batch."""
        if x.shape[0] == 0:
            return
        wide = x.double()
        mean = wide.mean(0)
        merged = self.merge(type(self)(mean, wide.abs().mean(0), (wide - mean).square().sum(0), x.shape[0]))
        self.mean, self.mean_abs, self.deviation = merged.mean, merged.mean_abs, merged.deviation
        self.num_tokens = merged.num_tokens

    def merge(self, other: Self) -> Self:
        """The moments of both sets of tokens."""
        count = self.num_tokens + other.num_tokens
        if count == 0:
            return self
        share = other.num_tokens / count
        gap = other.mean - self.mean
        return type(self)(
            self.mean + gap * share,
            self.mean_abs + (other.mean_abs - self.mean_abs) * share,
            self.deviation + other.deviation + gap.square() * self.num_tokens * share,
            count,
        )

    def scaled(self, factor: Float[Tensor, "in"]) -> Self:
        """The statistic of factor·x."""
        f = factor.double()
        return type(self)(self.mean * f, self.mean_abs * f.abs(), self.deviation * f.square(), self.num_tokens)

    def variance(self) -> Float[Tensor, "in"]:
        """Population variance of each input feature.

        Raises:
            ValueError: no tokens were seen.
        """
        if self.num_tokens == 0:
            raise ValueError("no calibration token reached this layer")
        return self.deviation / self.num_tokens

    @staticmethod
    def nbytes_for(width: int) -> int:
        """Three float64 [width]."""
        return 24 * width

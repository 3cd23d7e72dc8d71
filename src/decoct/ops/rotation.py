"""Orthogonal changes of basis of the last axis: randomised Hadamard transforms, or any orthogonal matrix."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from decoct.ops.hadamard import hadamard, random_signs

_AT_ONCE = 1 << 20  # entries in float64 at a time


@dataclass(frozen=True, eq=False, slots=True)
class Turn:
    """y = Q·x for the last axis, Q orthogonal; float64 unless its caller asks for less.

    Attributes:
        signs: ±1, [n]; Q = H·diag(signs), with H the orthonormal Hadamard transform. Or
        matrix: Q itself, [n, n].
        keeps_mean: reflect afterwards so that the vector of ones stays what it is: inputs of mean zero keep mean zero.
    """

    signs: Float[Tensor, " n"] | None = None
    matrix: Float[Tensor, "n n"] | None = None
    keeps_mean: bool = False

    @classmethod
    def random(cls, n: int, seed: int, *, keeps_mean: bool = False) -> "Turn":
        """A Hadamard transform after random signs, the same for the same seed on every machine."""
        return cls(signs=random_signs(n, seed), keeps_mean=keeps_mean)

    def __call__(self, x: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows n"]:
        """Turn the last axis, in the dtype of `x` (float32 or float64)."""
        if self.matrix is not None:
            return x @ self.matrix.to(x.dtype).T
        assert self.signs is not None
        y = hadamard(x * self.signs.to(x.dtype))
        return y if not self.keeps_mean else _reflected(y, hadamard(_ones(x) * self.signs.to(x.dtype)))

    def __len__(self) -> int:
        """How many entries it turns."""
        given = self.matrix if self.matrix is not None else self.signs
        assert given is not None
        return len(given)

    def dense(self) -> Float[Tensor, "n n"]:
        """Q, float64."""
        return self(torch.eye(len(self), dtype=torch.float64)).T.contiguous()

    def rows(
        self,
        matrix: Float[Tensor, "out n"],
        *,
        factor: Float[Tensor, " n"] | None = None,
        centre: bool = False,
        dtype: torch.dtype | None = None,
    ) -> Float[Tensor, "out n"]:
        """Every row turned, in float64, a few at a time.

        Args:
            matrix: any float dtype.
            factor: what columns are multiplied by before.
            centre: whether each row loses its mean before.
            dtype: of the result; None: the matrix's.
        """
        out = torch.empty(matrix.shape, dtype=dtype or matrix.dtype)
        step = max(1, _AT_ONCE // matrix.shape[-1])
        for start in range(0, len(matrix), step):
            piece = matrix[start : start + step].double()
            piece = piece - piece.mean(-1, keepdim=True) if centre else piece
            out[start : start + step] = self(piece if factor is None else piece * factor.double()).to(out.dtype)
        return out

    def columns(
        self, matrix: Float[Tensor, "n in"], *, centre: bool = False, dtype: torch.dtype | None = None
    ) -> Float[Tensor, "n in"]:
        """Every column turned: Q·matrix, as `rows` does it."""
        out = torch.empty(matrix.shape, dtype=dtype or matrix.dtype)
        step = max(1, _AT_ONCE // len(matrix))
        for start in range(0, matrix.shape[1], step):
            piece = matrix[:, start : start + step].T
            out[:, start : start + step] = self.rows(piece, centre=centre, dtype=out.dtype).T
        return out


def _ones(x: Tensor) -> Float[Tensor, " n"]:
    """The unit vector along (1, …, 1)."""
    return torch.full((x.shape[-1],), x.shape[-1] ** -0.5, dtype=x.dtype)


def _reflected(y: Float[Tensor, "*rows n"], image: Float[Tensor, " n"]) -> Float[Tensor, "*rows n"]:
    """Mirrored so that `image`, where the unit vector of ones has been turned to, goes back there."""
    across = image - _ones(y)
    size = across.square().sum()
    return y if size < torch.finfo(y.dtype).eps else y - (y @ across).mul(2 / size).unsqueeze(-1) * across

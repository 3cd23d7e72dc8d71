"""Rounding with feedback (arXiv 2210.17323): what rounding one input feature loses, those not yet rounded make up for.

The loop is the same for every grid: GPTQ's, a table of values, a grid with outliers. What differs is how one feature's
weights are rounded, and that is a `Rounding`.
"""

from dataclasses import dataclass
from typing import Protocol, Self

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from decoct.ops.codebook import between
from decoct.ops.grid import Grid
from decoct.ops.linalg import inverse_factor, revived

_LEAF = 16  # features rounded one by one before the rest is updated by a matrix product


class Rounding(Protocol):
    """Rounds one feature at a time and remembers the codes."""

    def __call__(self, column: Float[Tensor, " out"], feature: int, lost: Float[Tensor, " out"]) -> None:
        """Round the weights of `feature`, as they are when its turn comes, and write column - rounded to `lost`.

        Args:
            column: float32; must not be changed.
            feature: its number in the matrix.
            lost: float32, to be written.
        """


@dataclass(frozen=True, slots=True)
class Elimination:
    """The order in which features are rounded, and how the error of each reaches those after it.

    Attributes:
        order: numbers of the features, the first to be rounded first.
        upper: U with Uᵀ·U = (H + damping)⁻¹, rows and columns in that order.
        dead: features that never fired, H_jj = 0; their weights are taken to be zero. In the matrix's order.
        drift: P of GPTAQ (arXiv 2504.02692), upper triangular, in `order`: what each weight sends on to the features
            after it, so that outputs stay where other inputs had put them; None: nothing.
    """

    order: Int[Tensor, " in"]
    upper: Float[Tensor, "in in"]
    dead: Bool[Tensor, " in"]
    drift: Float[Tensor, "in in"] | None = None

    @classmethod
    def of(
        cls,
        H: Float[Tensor, "in in"],
        *,
        damping: float = 0.01,
        act_order: bool = True,
        last: Int[Tensor, " kept"] | None = None,
        moved: Float[Tensor, "in in"] | None = None,
    ) -> Self:
        """Factor the Hessian.

        Args:
            H: float32, symmetric.
            damping: fraction of its mean diagonal added to it; raised if the factorization fails.
            act_order: the feature with the largest second moment first.
            last: features to put at the end, where the errors of all others reach them.
            moved: E[(x' - x)·xᵀ] on H's scale, x' the inputs whose outputs are wanted; None: x itself.

        Raises:
            ValueError: H is not finite or cannot be factored.
        """
        dead = torch.diagonal(H) == 0
        H = revived(H)
        diagonal = torch.diagonal(H)
        order = torch.argsort(diagonal, descending=True, stable=True) if act_order else torch.arange(H.shape[0])
        if last is not None:
            late = torch.zeros_like(dead)
            late[last] = True
            order = torch.cat([order[~late[order]], last])
        upper = inverse_factor(H[order][:, order], damping).upper
        if moved is None:
            return cls(order, upper, dead)
        # What feature j owes is spread over the features after it by their inverse Hessian, U_FᵀU_F.
        drift = (moved[order][:, order] @ upper.T).triu_(1) @ upper
        return cls(order, upper, dead, drift)

    def pivots(self) -> Float[Tensor, " in"]:
        """U_jj of each feature, in the matrix's order: an error e of feature j costs (e / U_jj)² when it is made."""
        found = torch.empty_like(torch.diagonal(self.upper))
        found[self.order] = torch.diagonal(self.upper)
        return found

    def run(self, w: Float[Tensor, "out in"], rounding: Rounding, num_kept: int = 0) -> Float[Tensor, "out kept"]:
        """Round every feature but the last `num_kept` of the order; gives what has become of those.

        Features are split in half recursively: the left half is rounded, its errors are pushed into the right half by
        one matrix product, then the right half is rounded. That is GPTQ's update in another order of summation, and
        nearly all of its work becomes large products.

        Args:
            w: float32.
            rounding: called once for each feature that is rounded.
            num_kept: features that are not rounded but take up the errors of all others.
        """
        features = w.masked_fill(self.dead, 0.0).T[self.order].contiguous()  # [in, out]: a feature is contiguous
        stop = features.shape[0] - num_kept
        loop = _Loop(features, self.upper, self.drift, self.order.tolist(), rounding)
        loop.run(0, stop)
        if num_kept:
            loop.push(0, stop, features.shape[0])
        return features[stop:].T.contiguous()


class _Loop:
    """The state of one matrix's elimination; features are rows here, in the order of elimination."""

    def __init__(
        self, features: Tensor, U: Tensor, drift: Tensor | None, numbers: list[int], rounding: Rounding
    ) -> None:
        self._features, self._U, self._drift, self._numbers, self._rounding = features, U, drift, numbers, rounding
        self._diagonal: list[float] = torch.diagonal(U).tolist()
        self._errors = torch.empty_like(features)

    def run(self, start: int, stop: int) -> None:
        """Round features [start, stop), which already carry the errors of all before them."""
        if stop - start <= _LEAF:
            self._leaf(start, stop)
            return
        middle = start + (stop - start + 1) // 2
        self.run(start, middle)
        self.push(start, middle, stop)
        self.run(middle, stop)

    def push(self, start: int, middle: int, stop: int) -> None:
        """Let features [middle, stop) make up for the errors of [start, middle)."""
        errors = self._errors[start:middle]
        self._features[middle:stop].addmm_(self._U[start:middle, middle:stop].T, errors, alpha=-1.0)
        if self._drift is not None:
            self._features[middle:stop].addmm_(self._drift[start:middle, middle:stop].T, self._features[start:middle])

    def _leaf(self, start: int, stop: int) -> None:
        for j in range(start, stop):
            error = self._errors[j]
            self._rounding(self._features[j], self._numbers[j], error)
            error.div_(self._diagonal[j])
            if j + 1 < stop:
                self._features[j + 1 : stop].addr_(self._U[j, j + 1 : stop], error, alpha=-1.0)
                if self._drift is not None:
                    self._features[j + 1 : stop].addr_(self._drift[j, j + 1 : stop], self._features[j])


class GridRounding:
    """Rounding to a uniform grid whose scales are fixed beforehand.

    Attributes:
        codes: one row for each feature; the code of zero until the feature is rounded.
    """

    def __init__(self, grid: Grid, shape: tuple[int, int], survivors: Bool[Tensor, "out in"] | None = None) -> None:
        """Take a grid for a matrix of a shape; where `survivors` is False the rounded value is zero."""
        out, width = shape
        self._scale = grid.scale.float().T.contiguous()
        self._zero = None if grid.zero is None else grid.zero.float().T.contiguous()
        self._survivors = None if survivors is None else survivors.T.contiguous()
        self._middle = 2 ** (grid.bits - 1)
        self._top = 2**grid.bits - 1
        group = torch.arange(width) // grid.group_size
        self._group: list[int] = group.tolist()
        codes = torch.tensor(self._middle, dtype=torch.uint8) if grid.zero is None else grid.zero.T[group]
        self.codes: UInt8[Tensor, "in out"] = codes.expand(width, out).contiguous()

    def __call__(self, column: Float[Tensor, " out"], feature: int, lost: Float[Tensor, " out"]) -> None:
        """See Rounding."""
        scale = self._scale[self._group[feature]]
        zero = self._middle if self._zero is None else self._zero[self._group[feature]]
        step = column.div(scale).round_().clamp_(-zero, self._top - zero)  # the code, counted from zero
        if self._survivors is not None:
            step = torch.where(self._survivors[feature], step, 0.0)
        self.codes[feature] = step + zero
        torch.addcmul(column, step, scale, value=-1.0, out=lost)

    def finish(self) -> UInt8[Tensor, "out in"]:
        """The codes as a matrix."""
        return self.codes.T.contiguous()


class TableRounding:
    """Rounding to the nearest value of each row's table."""

    def __init__(
        self, tables: Float[Tensor, "out entries"], width: int, survivors: Bool[Tensor, "out in"] | None = None
    ) -> None:
        """Take tables in ascending order; where `survivors` is False the rounded value is zero."""
        self._tables = tables.float()
        self._middles = between(self._tables)
        self._survivors = None if survivors is None else survivors.T.contiguous()
        self._codes = torch.zeros(width, tables.shape[0], dtype=torch.uint8)

    def __call__(self, column: Float[Tensor, " out"], feature: int, lost: Float[Tensor, " out"]) -> None:
        """See Rounding."""
        index = torch.searchsorted(self._middles, column.unsqueeze(1))
        value = self._tables.gather(1, index).squeeze(1)
        if self._survivors is not None:
            value = torch.where(self._survivors[feature], value, 0.0)
        self._codes[feature] = index.squeeze(1)
        torch.sub(column, value, out=lost)

    def finish(self) -> UInt8[Tensor, "out in"]:
        """The codes as a matrix."""
        return self._codes.T.contiguous()


class OutlierRounding:
    """Another rounding, whose largest losses are stored apart, in 16 bits, and so are hardly lost at all."""

    def __init__(
        self, inner: Rounding, shape: tuple[int, int], limit: Float[Tensor, "in #out"], dtype: torch.dtype
    ) -> None:
        """Store what `inner` loses of an entry where its square exceeds `limit`.

        Args:
            inner: what rounds.
            shape: of the matrix.
            limit: for each feature, or for each entry of each feature; negative: always, infinite: never.
            dtype: in which losses are stored.
        """
        self._inner, self._limit = inner, limit
        self._stored = torch.zeros(shape[1], shape[0], dtype=dtype)

    def __call__(self, column: Float[Tensor, " out"], feature: int, lost: Float[Tensor, " out"]) -> None:
        """See Rounding."""
        self._inner(column, feature, lost)
        stored = torch.where(lost.square() > self._limit[feature], lost, 0.0).to(self._stored.dtype)
        self._stored[feature] = stored
        lost.sub_(stored)

    def finish(self) -> Float[Tensor, "out in"]:
        """What is to be added to the rounded matrix; zero where nothing was stored."""
        return self._stored.T.contiguous()

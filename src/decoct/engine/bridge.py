"""The MLP before a gap, refitted to also do what the missing blocks did: a least-squares problem in closed form.

ReplaceMe (arXiv 2505.02819) fits one linear map of the MLP's output and multiplies it into the last matrix. Here that
matrix itself is fitted, which can only be better: with a its input and y the block's output, W changes by
C·(A + λ·I)⁻¹, A = Σ a·aᵀ and C = Σ (t - y)·aᵀ, t what the missing blocks put out in the whole model.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from decoct.arch import Slot
from decoct.engine.data import Data
from decoct.engine.record import record_inputs
from decoct.engine.runner import LaidOut, Runner
from decoct.engine.shallow import ShallowModel
from decoct.model import Model
from decoct.ops.linalg import damped_cholesky
from decoct.stats import Gram
from decoct.weights import Dense, Weight

_DAMPING = 0.01  # of the mean of A's diagonal: λ


def check_bridge(model: Model) -> None:
    """Refuse a model whose blocks do not end in a dense matrix that writes the residual stream.

    Raises:
        ValueError: why not, and what to do.
    """
    found = [slot for slot in model.block_slots if slot.role == "mlp.down" and slot.writes == "resid"]
    if not found:
        raise ValueError(f"a {model.family.name} block has no single MLP to refit; leave bridge out")
    try:
        model.family.stream(model.config)
    except ValueError:
        raise ValueError(
            f"a norm stands between a {model.family.name} block's MLP and the residual stream; leave bridge out"
        ) from None
    for block in range(model.num_blocks):
        if model.prefix(block) + found[0].name in model.described:
            raise ValueError("a bridge refits dense matrices, and these are compressed already; leave bridge out")


def bridge_bytes(model: Model, data: Data, dtype: torch.dtype) -> int:
    """Memory that refitting takes: two chains of hidden states, and the sums of one least-squares problem."""
    out, middle = model.shape(model.prefix(0) + _last(model).name)
    return 2 * data.num_tokens * out * dtype.itemsize + 4 * (4 * middle * middle + 4 * middle * out)


@dataclass(frozen=True)
class Bridging:
    """Everything that refitting needs.

    Attributes:
        left: what is left of the model.
        tokens: calibration.
        dtype: what blocks run in.
    """

    left: ShallowModel
    tokens: Int[Tensor, "sequences length"]
    dtype: torch.dtype


@torch.no_grad()
def bridges(todo: Bridging) -> dict[str, Weight]:
    """The refitted matrices, by their names in what is left.

    A gap before the first block cannot be bridged, nor one behind a block that has no MLP any more.

    Raises:
        ValueError: hidden states that are not finite.
    """
    return _Bridges(todo).found()


class _Bridges:
    """Two chains of hidden states: of the whole model, and of what is left of it."""

    def __init__(self, todo: Bridging) -> None:
        self._left, self._base, self._dtype = todo.left, todo.left.base, todo.dtype
        self._runner, self._slot = Runner(self._base, todo.dtype), _last(self._base)
        table = self._base.weight(self._base.family.embed).unpack(todo.dtype)
        self._whole = self._runner.embed_all(todo.tokens, table)
        self._own = self._whole.clone()

    def found(self) -> dict[str, Weight]:
        """Block by block of what is left, each gap crossed by the whole model alone."""
        made: dict[str, Weight] = {}
        left, base, kept = self._left, self._base, self._left.kept
        for block in range(kept[0]):
            self._advance(self._whole, block, self._laid(base, block))
        for number, block in enumerate(kept):
            stop = kept[number + 1] if number + 1 < len(kept) else base.num_blocks
            for crossed in range(block, stop):
                self._advance(self._whole, crossed, self._laid(base, crossed))
            laid, name = self._laid(left, number), left.prefix(number) + self._slot.name
            if stop > block + 1 and self._slot not in left.missing_slots(number):
                before = left.weight(name)
                after = before.unpack(torch.float32) + self._change(block, laid)
                made[name] = Dense.of(after.to(before.dtype))
                laid = self._laid(left, number, made)
            self._advance(self._own, block, laid)
        return made

    def _laid(self, model: Model, number: int, new: Mapping[str, Weight] | None = None) -> LaidOut:
        """A block of the whole model, or of what is left of it, as the whole model's module at its place runs it."""
        block = number if model is self._base else self._left.kept[number]
        there, here = self._base.prefix(block), model.prefix(number)
        names = [here + slot.name for slot in model.block_slots]
        weights = {n.replace(here, there, 1): (new or {}).get(n) or model.weight(n) for n in names}
        vectors = {name.replace(here, there, 1): model.tensor(name) for name in model.others(number)}
        return self._runner.lay_out(block, weights, vectors)

    def _change(self, block: int, laid: LaidOut) -> Tensor:
        """By what the MLP's last matrix changes, float32."""
        out, middle = self._base.shape(self._base.prefix(block) + self._slot.name)
        gram, cross = Gram.empty(middle), torch.zeros(out, middle)
        module, path = self._runner.skeleton.blocks[block], self._runner.reader_paths()[self._slot.name]
        with record_inputs(module, {self._slot.name: path}) as read:
            for start, stop in self._batches():
                y = self._runner.run(block, laid, self._own[start:stop])
                a = read[self._slot.name].reshape(-1, middle)
                missed = (self._whole[start:stop].float() - y.float()).reshape(-1, out)
                gram.add(a)
                cross.addmm_(missed.T, a.float())
        scale = 2.0 / gram.num_tokens
        lower, _ = damped_cholesky(gram.matrix(), _DAMPING)
        found = torch.cholesky_solve(cross.T * scale, lower).T
        if not torch.isfinite(found).all():
            raise ValueError(f"block {block} gives NaN or infinite activations; the checkpoint or the text is damaged")
        return found

    def _advance(self, states: Tensor, block: int, laid: LaidOut) -> None:
        for start, stop in self._batches():
            states[start:stop] = self._runner.run(block, laid, states[start:stop])

    def _batches(self) -> list[tuple[int, int]]:
        count, length = self._own.shape[:2]
        size = self._runner.batch_size(count, length)
        return [(start, start + size) for start in range(0, count, size)]


def _last(model: Model) -> Slot:
    """The matrix through which the MLP writes the residual stream."""
    return next(slot for slot in model.block_slots if slot.role == "mlp.down")

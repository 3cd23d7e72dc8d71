"""The sublayer before a gap, refitted to also do what is missing behind it: a least-squares problem in closed form.

ReplaceMe (arXiv 2505.02819) fits one linear map of the MLP's output and multiplies it into the last matrix. Here that
matrix itself is fitted, which can only be better: with a its input and y the block's output, W changes by
C·(A + λ·I)⁻¹, A = Σ a·aᵀ and C = Σ (t - y)·aᵀ, t what the missing sublayers put out in the whole model; or by the best
map of a given rank (`ops.reduced_rank`). Either way W keeps its shape.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from decoct.arch import Slot
from decoct.engine.activations import Activations
from decoct.engine.gaps import Gap, describe_cuts, gaps_of
from decoct.engine.record import record_inputs
from decoct.engine.runner import LaidOut, Runner
from decoct.engine.shallow import ShallowModel
from decoct.methods.depth import Cut
from decoct.model import Model
from decoct.ops.reduced_rank import reduced_rank_ridge, ridge
from decoct.stats import Gram
from decoct.store import open_safetensors, save_safetensors
from decoct.weights import Dense, Weight

_DAMPING = 0.01  # of the mean of A's diagonal: λ


@dataclass(frozen=True)
class Bridging:
    """Everything that refitting needs.

    Attributes:
        left: what is left of the model.
        tokens: calibration.
        dtype: what blocks run in.
        rank: of what is added to a matrix; None: as it comes.
        in_memory: whether hidden states stay in memory.
        folder: where refitted matrices are kept.
        scratch: where hidden states are kept.
        message: told of every gap.
    """

    left: ShallowModel
    tokens: Int[Tensor, "sequences length"]
    dtype: torch.dtype
    rank: int | None
    in_memory: bool
    folder: Path
    scratch: Path
    message: Callable[[str], None]


@torch.no_grad()
def bridges(todo: Bridging) -> dict[str, Weight]:
    """The refitted matrices, by their names in what is left; what an earlier process refitted is taken up.

    A gap with nothing but the embedding before it cannot be bridged.

    Raises:
        ValueError: hidden states that are not finite.
    """
    gaps = gaps_of(todo.left)
    numbers = {block: number for number, block in enumerate(todo.left.kept)}
    wanted = {numbers[gap.before.block]: gap for gap in gaps if gap.before is not None}
    if any(not _path(todo, number).exists() for number in wanted):
        todo.scratch.mkdir(parents=True, exist_ok=True)
        _Bridges(todo, wanted).run()
    found: dict[str, Weight] = {}
    for number in wanted:
        saved = open_safetensors(_path(todo, number))
        found |= {name: Dense.of(saved.read(name)) for name in saved.tensors}
    for gap in gaps:
        missing = ", ".join(describe_cuts(gap.cuts))
        if gap.before is None:
            todo.message(f"warning: {missing} out without a bridge: nothing but the embedding is before it to refit")
        else:
            todo.message(f"bridged {missing}: {gap.before} is refitted")
    return found


def writer(model: Model, sublayer: Cut) -> Slot:
    """The matrix through which a sublayer writes the residual stream."""
    role = {"attn": "attn.o", "mlp": "mlp.down"}[sublayer.part]
    return next(slot for slot in model.block_slots if slot.role == role)


class _Bridges:
    """Two chains of hidden states: of the whole model, and of what is left of it.

    The first is always as far as the stream goes on behind the block that the second enters next. Both are on disk
    between blocks, so that an interrupted run goes on there.
    """

    def __init__(self, todo: Bridging, gaps: Mapping[int, Gap]) -> None:
        """`gaps`: by the number, in what is left, of the block before each."""
        self._todo, self._gaps = todo, gaps
        self._left, self._base = todo.left, todo.left.base
        self._runner = Runner(self._base, todo.dtype)
        self._stops = [*self._left.kept, self._base.num_blocks]
        self._last = max(gaps)
        self._whole, self._own = self._states("whole"), self._states("own")

    def run(self) -> None:
        """Block by block of what is left, each gap crossed by the whole model alone."""
        for number in range(self._begin(), self._last + 1):
            block, stop = self._stops[number], self._stops[number + 1]
            self._cross(block, stop, keep=block)
            laid = self._laid(self._left, number)
            if number in self._gaps:
                name, after = self._refitted(number, laid)
                save_safetensors(_path(self._todo, number), {name: after.unpack()}, {})
                laid = self._laid(self._left, number, {name: after})
            if number < self._last:
                self._advance(self._own, block, laid, number + 1)
            self._own.discard(number)
            self._whole.discard(block)
        self._whole.discard(self._stops[self._last + 1])

    def _begin(self) -> int:
        """The block of what is left to go on with: the chains hold what enters it, and what enters its original."""
        for number in reversed(range(self._last + 1)):
            if self._own.path(number).exists() and self._whole.path(self._stops[number]).exists():
                self._own.resume(number)
                self._whole.resume(self._stops[number])
                return number
        table = self._base.weight(self._base.family.embed).unpack(self._todo.dtype)
        for states in (self._own, self._whole):
            states.begin()
            for start, stop in self._batches():
                states.write(start, self._runner.embed(self._todo.tokens[start:stop], table))
            states.commit(0)
        self._cross(0, self._stops[0], keep=None)
        return 0

    def _cross(self, block: int, stop: int, keep: int | None) -> None:
        """The whole model's chain up to a block; the file with what enters `keep` stays."""
        for crossed in range(block, stop):
            self._advance(self._whole, crossed, self._laid(self._base, crossed), crossed + 1)
            if crossed != keep:
                self._whole.discard(crossed)

    def _advance(self, states: Activations, block: int, laid: LaidOut, number: int) -> None:
        """Run a block; its outputs are saved under a number."""
        states.begin()
        for start, stop in self._batches():
            states.write(start, self._runner.run(block, laid, states.read(start, stop)))
        states.commit(number)

    def _refitted(self, number: int, laid: LaidOut) -> tuple[str, Weight]:
        """The name and the new value of the matrix before a gap."""
        gap = self._gaps[number]
        assert gap.before is not None
        slot = writer(self._base, gap.before)
        name = self._left.prefix(number) + slot.name
        before = self._left.weight(name)
        after = before.unpack(torch.float32) + self._change(gap, gap.before.block, slot, laid)
        return name, Dense.of(after.to(before.dtype))

    def _change(self, gap: Gap, block: int, slot: Slot, laid: LaidOut) -> Tensor:
        """By what a matrix of this block changes, float32."""
        out, width = self._base.shape(self._base.prefix(block) + slot.name)
        gram, cross = Gram.empty(width), torch.zeros(out, width)
        module, path = self._runner.skeleton.blocks[block], self._runner.reader_paths()[slot.name]
        half: LaidOut | None = None
        if gap.halfway:  # a block without its MLP puts out what its MLP would read
            half = self._laid(ShallowModel.of(self._base, frozenset({Cut(gap.stop, "mlp")})), gap.stop)
        with record_inputs(module, {slot.name: path}) as read:
            for start, stop in self._batches():
                y = self._runner.run(block, laid, self._own.read(start, stop))
                t = self._whole.read(start, stop)
                t = t if half is None else self._runner.run(gap.stop, half, t)
                a = read[slot.name].reshape(-1, width)
                gram.add(a)
                cross.addmm_((t.float() - y.float()).reshape(-1, out).T, a.float())
        if not torch.isfinite(cross.sum()):
            raise ValueError(f"block {block} gives NaN or infinite activations; the checkpoint or the text is damaged")
        return _fitted(gram.matrix(), cross * (2.0 / gram.num_tokens), self._todo.rank)

    def _laid(self, model: Model, number: int, new: Mapping[str, Weight] | None = None) -> LaidOut:
        """A block of the whole model, or of one with less, as the whole model's module at its place runs it."""
        block = model.kept[number] if isinstance(model, ShallowModel) else number
        there, here = self._base.prefix(block), model.prefix(number)
        names = [here + slot.name for slot in model.block_slots]
        weights = {n.replace(here, there, 1): (new or {}).get(n) or model.weight(n) for n in names}
        vectors = {name.replace(here, there, 1): model.tensor(name) for name in model.others(number)}
        return self._runner.lay_out(block, weights, vectors)

    def _states(self, name: str) -> Activations:
        todo = self._todo
        count, length = todo.tokens.shape
        shape = (count, length, self._base.shape(self._base.family.embed)[1])
        return Activations(todo.scratch, shape, todo.dtype, in_memory=todo.in_memory, name=name)

    def _batches(self) -> Iterator[tuple[int, int]]:
        count, length = self._todo.tokens.shape
        size = self._runner.batch_size(count, length)
        return ((start, start + size) for start in range(0, count, size))


def _fitted(gram: Tensor, cross: Tensor, rank: int | None) -> Tensor:
    """The change, of a rank or as it comes."""
    if rank is None:
        return ridge(gram, cross, _DAMPING)[0]
    U, V = reduced_rank_ridge(gram, cross, rank, _DAMPING)
    return U @ V


def _path(todo: Bridging, number: int) -> Path:
    """The file with the refitted matrix of a block of what is left."""
    return todo.folder / f"bridge-{number:05d}.safetensors"

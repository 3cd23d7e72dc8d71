"""A model whose blocks keep different numbers of neurons: matrices keep their shape, and store what is left of them.

No config of transformers can say that blocks differ in width. So the config stays, and the matrices are `Padded`: the
neurons that are left come first, the others are zero and not stored.
"""

from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from typing_extensions import override

from decoct.engine.block import Block, Step
from decoct.engine.narrow import (
    NarrowModel,
    Trunk,
    channels_of,
    check_uncompressed,
    mlp_trunk,
    narrowed_block,
    widths_of,
)
from decoct.engine.record import record
from decoct.engine.runner import Runner
from decoct.engine.stream import Event, OnEvent
from decoct.methods.width import WidthMethod
from decoct.model import Model
from decoct.ops.global_share import global_share
from decoct.store import read_json, write_json
from decoct.weights import Dense, Padded, Weight, describe

_COUNTS = "neurons.json"  # in the stage's folder: what each block keeps


@dataclass(frozen=True)
class UnevenModel(NarrowModel):
    """A model of which every block keeps another number of neurons, as many on average as in a `NarrowModel`.

    Attributes:
        counts: neurons that each block keeps; empty: not known yet.
    """

    counts: tuple[int, ...] = field(kw_only=True, default=())

    @classmethod
    @override
    def of(cls, base: Model, method: WidthMethod) -> "UnevenModel":
        trunk = mlp_trunk(base)
        check_uncompressed(base, method)
        if any(writer.folds > 1 for writer in trunk.writers):
            raise ValueError(f"a {base.family.name} model has gate and up in one matrix; leave uneven out")
        widths = widths_of(base, method)
        names = (trunk.reader.name, *(writer.slot.name for writer in trunk.writers))
        described = dict(base.described) | {
            base.prefix(block) + name: _guess(base, base.prefix(block) + name, neurons, trunk)
            for block, neurons in enumerate(_guessed_counts(base, trunk, widths.neurons, method.multiple_of))
            for name in names
        }
        given: tuple[Any, ...] = (base.source, base.family, described, base.lineage, base.cache)
        found = cls(*given, base=base, method=method, widths=widths)
        found.check_config()
        return found

    @property
    @override
    def config(self) -> dict[str, Any]:
        return self.base.config | ({"mlp_bias": True} if self.method.bias else {})

    @override
    def shape(self, name: str) -> tuple[int, ...]:
        return self.base.shape(name)

    @property
    @override
    def nbytes(self) -> int:
        trunk = mlp_trunk(self.base)
        slots = (trunk.reader, *(writer.slot for writer in trunk.writers))
        whole = sum(prod(self.base.shape(self.prefix(0) + slot.name)) for slot in slots)
        lost = whole - whole // trunk.num_units * self.widths.neurons
        return self.base.nbytes + (self._bias_entries() - lost) * self.num_blocks * self.dtype.itemsize

    @override
    def nbytes_under(self, prefix: str) -> int:
        return self.base.nbytes_under(prefix)

    @override
    def weight(self, name: str) -> Weight:
        if name in self.described:
            raise TypeError(f"{name}: what is left of it shows only in the run")
        return self.base.weight(name)

    @override
    def step(self) -> Step:
        trunk, numbers = mlp_trunk(self.base), {self.prefix(block): block for block in range(self.num_blocks)}

        def step(block: Block) -> Block:
            if block.prefix is None:
                return block
            information = self.information.get(block.prefix, {}).get(trunk.edge)
            made = narrowed_block(block, trunk, self, information, self.counts[numbers[block.prefix]])
            return self._at_full_size(made, trunk)

        return step

    def _at_full_size(self, block: Block, trunk: Trunk) -> Block:
        """Narrowed matrices in the corner of what the config says; their biases with zeros behind them."""
        assert block.prefix is not None
        weights, vectors = dict(block.weights), dict(block.vectors)
        for slot in (trunk.reader, *(writer.slot for writer in trunk.writers)):
            name = block.prefix + slot.name
            out, cols = self.base.shape(name)
            weights[name] = Padded.of(weights[name], (out, cols))
            bias = name.removesuffix("weight") + "bias"
            if bias in vectors and len(vectors[bias]) < out:
                vectors[bias] = torch.cat([vectors[bias], vectors[bias].new_zeros(out - len(vectors[bias]))])
        return replace(block, weights=weights, vectors=vectors)


def _guessed_counts(base: Model, trunk: Trunk, neurons: int, step: int) -> list[int]:
    """Equal widths but for two that differ by a step, so that group sizes that fit only some widths are noticed."""
    counts = [neurons] * base.num_blocks
    if base.num_blocks > 1 and step < neurons <= trunk.num_units - step:
        counts[:2] = neurons + step, neurons - step
    return counts


def _guess(base: Model, name: str, neurons: int, trunk: Trunk) -> dict[str, Any]:
    """What is expected of a matrix with so many neurons."""
    out, cols = base.shape(name)
    left = (out, neurons) if name.endswith(trunk.reader.name) else (neurons, cols)
    return describe(Padded.of(Dense.of(torch.empty(left, dtype=base.dtype, device="meta")), (out, cols)))


@dataclass(frozen=True, slots=True)
class Sizing:
    """Everything that finding the blocks' widths needs.

    Attributes:
        model: what it becomes.
        tokens: calibration; None: the method needs none.
        dtype: what blocks run in.
        folder: where the widths are kept.
        on_event: told of every block.
    """

    model: UnevenModel
    tokens: Int[Tensor, "sequences length"] | None
    dtype: torch.dtype
    folder: Path
    on_event: OnEvent


def sized(todo: Sizing) -> UnevenModel:
    """The model with every block's number of neurons, found in one run of the whole model, or by an earlier process."""
    path, model = todo.folder / _COUNTS, todo.model
    if not path.exists():
        scores = _scores(todo)
        counts = global_share(scores, model.widths.neurons * model.num_blocks, model.method.multiple_of)
        todo.folder.mkdir(parents=True, exist_ok=True)
        write_json(path, {"counts": counts})
    return replace(model, counts=tuple(int(count) for count in read_json(path)["counts"]))


@torch.no_grad()
def _scores(todo: Sizing) -> list[Tensor]:
    """What each block's neurons are worth to the method, in the model as it is."""
    base, method = todo.model.base, todo.model.method
    trunk, found = mlp_trunk(base), []
    runner = None if todo.tokens is None else Runner(base, todo.dtype)
    hidden = None
    if runner is not None and todo.tokens is not None:
        hidden = runner.embed_all(todo.tokens, base.weight(base.family.embed).unpack(todo.dtype))
    for number in range(base.num_blocks):
        prefix = base.prefix(number)
        weights = {prefix + slot.name: base.weight(prefix + slot.name) for slot in base.block_slots}
        stats: dict[str, Any] = {}
        if runner is not None and hidden is not None and todo.tokens is not None:
            base.prefetch(number + 1)
            laid, size = runner.lay_out(number, weights), runner.batch_size(*todo.tokens.shape)
            wanted = {trunk.edge: method.scoring} if method.scoring else {}
            module = runner.skeleton.blocks[number]
            with record(module, runner.edges, wanted, runner.edge_widths(), runner.reader_paths()) as recorder:
                for start in range(0, len(hidden), size):
                    hidden[start : start + size] = runner.run(number, laid, hidden[start : start + size])
            stats = dict(recorder.stats)
        information = todo.model.information.get(prefix, {}).get(trunk.edge)
        found.append(method.scores(channels_of(weights, stats, prefix, trunk, information)))
        todo.on_event(Event(f"block {number}, neurons", number + 1, base.num_blocks, None, 0.0, 0))
    return found

"""A model with fewer MLP neurons and attention heads: what that makes of its config and shapes, and of one block."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import ceil, prod
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from typing_extensions import override

from decoct.arch import Slot
from decoct.arch.hf import Skeleton, all_settings
from decoct.engine.block import Block, Stats, Step
from decoct.engine.record import Wanted
from decoct.engine.reshaped import Reshaped
from decoct.engine.shallow import check_whole
from decoct.engine.thin import whole
from decoct.methods import name_of
from decoct.methods.width import Channels, Narrowed, WidthMethod
from decoct.model import Model
from decoct.weights import Dense, Weight

_NEURONS = ("ffn_dim", "intermediate_size", "n_inner")  # what configs call the width of the MLP
_SLACK = 1e-6  # of a neuron: sums of parameters are whole numbers, their fractions are not exact
_SPLIT = ("attn.q", "attn.k", "attn.v")


@dataclass(frozen=True, slots=True)
class Trunk:
    """An edge of every block whose channels can be taken out; slots are relative to the block.

    Attributes:
        edge: as slots spell it in `reads`.
        reader: the slot that reads it.
        writers: the slots that make it, each with how many rows it has for a unit's channels: one behind the other
            `folds` times (gate and up in one matrix), each row standing for several channels (grouped queries).
        unit: channels that go together.
        num_units: of the model as it is.
    """

    edge: str
    reader: Slot
    writers: tuple["Writer", ...]
    unit: int
    num_units: int


@dataclass(frozen=True, slots=True)
class Writer:
    """See Trunk."""

    slot: Slot
    folds: int = 1
    rows: int = 1

    def row_numbers(self, units: Int[Tensor, " kept"], num_units: int) -> Int[Tensor, " rows"]:
        """The rows that belong to some units."""
        own = (units.unsqueeze(1) * self.rows + torch.arange(self.rows)).reshape(-1)
        starts = torch.arange(self.folds).unsqueeze(1) * (num_units * self.rows)
        return (starts + own).reshape(-1)


@dataclass(frozen=True, slots=True)
class Widths:
    """How many stay of each block's MLP neurons and key-value heads; 0: all of them."""

    neurons: int
    kv_heads: int


def mlp_trunk(model: Model) -> Trunk:
    """The middle of the MLP.

    Raises:
        ValueError: the family's blocks have no single MLP.
    """
    slots = model.block_slots
    reader = next((slot for slot in slots if slot.role == "mlp.down"), None)
    if reader is None:
        raise ValueError(
            f"a {model.family.name} block has no single MLP whose neurons could go; take out experts instead"
        )
    width = _shape(model, reader)[1]
    writers = [slot for slot in slots if slot.writes == reader.reads]
    found = tuple(Writer(slot, folds=_shape(model, slot)[0] // width) for slot in writers)
    return Trunk(reader.reads, reader, found, 1, width)


def head_trunk(model: Model) -> Trunk:
    """The middle of attention, by key-value heads.

    Raises:
        ValueError: heads of this family cannot be taken out.
    """
    by_role = {slot.role: slot for slot in model.block_slots}
    missing = [role for role in (*_SPLIT, "attn.o") if role not in by_role]
    if missing or "head_dim" not in all_settings(model.config):
        raise ValueError(f"heads of a {model.family.name} model cannot be taken out; set keep_heads: 1")
    head, reader = model.family.head_size(model.config), by_role["attn.o"]
    for name in model.others(0):
        if "q_norm" in name and prod(model.shape(name)) != head:
            raise ValueError(f"a norm over all heads of a {model.family.name} block would change; set keep_heads: 1")
    count = _shape(model, by_role["attn.k"])[0] // head
    writers = tuple(Writer(by_role[role], rows=_shape(model, by_role[role])[0] // count) for role in _SPLIT)
    return Trunk(reader.reads, reader, writers, _shape(model, reader)[1] // count, count)


def trunks(model: Model, method: WidthMethod) -> tuple[Trunk, ...]:
    """The edges that a method narrows, in the order of computing.

    Raises:
        ValueError: the family does not allow it.
    """
    heads = (head_trunk(model),) if method.keep_heads < 1 else ()
    return (*heads, mlp_trunk(model)) if method.keep < 1 else heads


def widths_of(model: Model, method: WidthMethod) -> Widths:
    """How many neurons and heads stay.

    Raises:
        ValueError: more would have to go than the blocks have.
    """
    kv_heads, freed = 0, 0
    if method.keep_heads < 1:
        heads = head_trunk(model)
        kv_heads = max(1, round(heads.num_units * method.keep_heads))
        freed = _unit_entries(model, heads) * (heads.num_units - kv_heads)
        if kv_heads == heads.num_units:
            raise ValueError(f"keep_heads={method.keep_heads} takes out none of {heads.num_units} key-value heads")
    if method.keep == 1:
        return Widths(0, kv_heads)
    mlp, full = mlp_trunk(model), whole(model).num_parameters
    wanted = (model.num_parameters - full * method.keep) / model.num_blocks - freed
    left = mlp.num_units - wanted / _unit_entries(model, mlp)
    neurons = int((left + _SLACK) // method.multiple_of) * method.multiple_of
    if neurons < method.multiple_of:
        raise ValueError(_too_few(model, method, mlp, freed))
    if left >= mlp.num_units:
        others = f"keep_heads={method.keep_heads}, keep_hidden={method.keep_hidden}"
        raise ValueError(f"{others} alone leave less than keep={method.keep}; set keep: 1")
    return Widths(neurons, kv_heads)


@dataclass(frozen=True)
class NarrowModel(Reshaped):
    """A model with fewer neurons and heads.

    Attributes:
        method: how it is narrowed.
        widths: what stays.
        information: where the method goes by gradients: see `Channels`, by a block's prefix and edge.
    """

    method: WidthMethod = field(kw_only=True)
    widths: Widths = field(kw_only=True)
    information: Mapping[str, Mapping[str, Tensor]] = field(kw_only=True, default_factory=dict)

    @classmethod
    def of(cls, base: Model, method: WidthMethod) -> "NarrowModel":
        """Narrow a model as a method says.

        Raises:
            ValueError: it cannot be; see `widths_of`, or transformers would make another shape of the config.
        """
        given: tuple[Any, ...] = (base.source, base.family, base.described, base.lineage, base.cache)
        found = cls(*given, base=base, method=method, widths=widths_of(base, method))
        check_uncompressed(base, method)
        found.check_config()
        return found

    @property
    @override
    def config(self) -> dict[str, Any]:
        before, heads = self.base.config, self.widths.kv_heads
        found = dict(before)
        if self.widths.neurons:
            found[next((key for key in _NEURONS if before.get(key)), "n_inner")] = self.widths.neurons
        if heads:
            repeats = head_trunk(self.base).unit // self.family.head_size(before)
            found |= {
                "num_attention_heads": heads * repeats, "num_key_value_heads": heads,
                "head_dim": self.family.head_size(before),
            }  # fmt: skip
        if self.method.bias:
            found |= {"mlp_bias": True} if self.method.keep < 1 else {}
            found |= {"attention_bias": True} if heads else {}
        return found

    @override
    def shape(self, name: str) -> tuple[int, ...]:
        shape = self.base.shape(name)
        slot = self._slot_names.get(name)
        if slot is None:
            return shape
        out, cols = shape
        for trunk, kept in self._narrowed():
            if slot == trunk.reader:
                cols = cols // trunk.num_units * kept
            if any(slot == writer.slot for writer in trunk.writers):
                out = out // trunk.num_units * kept
        return out, cols

    @property
    @override
    def nbytes(self) -> int:
        lost = sum(prod(self.base.shape(name)) - prod(self.shape(name)) for name in self._slot_names)
        biases = self._bias_entries() * self.num_blocks
        return self.base.nbytes + (biases - lost) * self.dtype.itemsize

    @override
    def weight(self, name: str) -> Weight:
        if self.shape(name) != self.base.shape(name):
            raise TypeError(f"{name}: what is left of it shows only in the run")
        return self.base.weight(name)

    @property
    @override
    def wanted(self) -> Wanted:
        return self._read(trunks(self.base, self.method)[:1])

    @override
    def halfway(self) -> tuple[Reshaped, Wanted] | None:
        """Without heads: neurons are chosen, and what reads them is refitted, on what the heads left make of them."""
        wanted = self._read(trunks(self.base, self.method)[1:])
        if not wanted:
            return None
        widths = replace(self.widths, neurons=mlp_trunk(self.base).num_units)
        return replace(self, method=replace(self.method, keep=1.0), widths=widths), wanted

    @override
    def step(self) -> Step:
        found = trunks(self.base, self.method)

        def step(block: Block) -> Block:
            if block.prefix is None:
                return block
            known = self.information.get(block.prefix, {})
            for trunk in found:
                if trunk != found[0] and block.rerun is not None:
                    block = replace(block, stats=block.rerun(block))
                block = narrowed_block(block, trunk, self, known.get(trunk.edge), self.kept(trunk))
            return block

        return step

    def kept(self, trunk: Trunk) -> int:
        """How many of a trunk's units stay."""
        return self.widths.neurons if trunk.unit == 1 and trunk.reader.role == "mlp.down" else self.widths.kv_heads

    def check_config(self) -> None:
        """Whether transformers makes these shapes of the config.

        Raises:
            ValueError: it does not.
        """
        try:
            skeleton = Skeleton(self.config, self.family)
        except ValueError as error:
            raise ValueError(f"{error}; choose another keep_heads or keep_hidden") from None
        made = {name: tuple(each.shape) for name, each in skeleton.blocks[0].named_parameters()}
        prefix = self.prefix(0)
        for slot in self.block_slots:
            if slot.param is not None:
                continue  # fused tensors of experts are put together from several slots
            path = self.family.module_name(prefix + slot.name).removeprefix(prefix)
            shape = self.shape(prefix + slot.name)
            if made.get(path) != (tuple(reversed(shape)) if slot.transposed else shape):
                raise ValueError(
                    f"a {self.family.name} config cannot say that {slot.role} is {shape[0]} x {shape[1]}; "
                    "set keep_heads and keep_hidden to 1, or choose a depth method"
                )
        lacking = [f"{role}.bias" for role in self._biased() if f"{role}.bias" not in made]
        if lacking:
            raise ValueError(f"a {self.family.name} model has no place for {lacking[0]}; set bias: false")

    def _biased(self) -> list[str]:
        if not self.method.bias:
            return []
        prefix = self.prefix(0)
        readers = [trunk.reader.name for trunk, _ in self._narrowed()]
        return [self.family.module_name(prefix + n).removeprefix(prefix).removesuffix(".weight") for n in readers]

    def _bias_entries(self) -> int:
        """Of one block: where one matrix of an edge has a bias, all of them have."""
        if not self.method.bias:
            return 0
        slots = [slot for t, _ in self._narrowed() for slot in (t.reader, *(writer.slot for writer in t.writers))]
        return sum(self.shape(self.prefix(0) + slot.name)[0] for slot in slots)

    def _read(self, some: tuple[Trunk, ...]) -> Wanted:
        """What the method reads of some edges."""
        return {trunk.edge: self.method.stats for trunk in some if self.method.stats}

    def _narrowed(self) -> list[tuple[Trunk, int]]:
        return [(trunk, self.kept(trunk)) for trunk in trunks(self.base, self.method)]


def channels_of(
    weights: Mapping[str, Weight], stats: Stats, prefix: str, trunk: Trunk, information: Tensor | None
) -> Channels:
    """What a method sees of a trunk in the block with this prefix."""
    return Channels(
        weights[prefix + trunk.reader.name].unpack(torch.float32),
        tuple(_as_channels(weights[prefix + w.slot.name], w, trunk) for w in trunk.writers),
        tuple(trunk.unit // writer.rows for writer in trunk.writers),
        trunk.unit,
        stats.get(trunk.edge, {}),
        information,
    )


def narrowed_block(block: Block, trunk: Trunk, model: NarrowModel, information: Tensor | None, num_kept: int) -> Block:
    """The block with so many of a trunk's units."""
    prefix = block.prefix
    assert prefix is not None
    weights, vectors = dict(block.weights), dict(block.vectors)
    reader = prefix + trunk.reader.name
    given = channels_of(weights, block.stats, prefix, trunk, information)
    try:
        left = model.method.narrow(given, num_kept)
    except ValueError as error:
        raise ValueError(f"{block.label}, {trunk.edge}: {error}") from error
    dtype = weights[reader].dtype
    weights[reader] = Dense.of(left.reader.to(dtype))
    _shift(vectors, reader, left, dtype)
    for writer in trunk.writers:
        name = prefix + writer.slot.name
        rows = writer.row_numbers(left.units, trunk.num_units)
        weights[name] = Dense.of(weights[name].unpack()[rows])
        bias = name.removesuffix("weight") + "bias"
        if bias in vectors:
            vectors[bias] = vectors[bias][rows]
        elif model.method.bias:
            vectors[bias] = torch.zeros(len(rows), dtype=dtype)
    return replace(block, weights=weights, vectors=vectors)


def _shift(vectors: dict[str, Tensor], reader: str, left: Narrowed, dtype: torch.dtype) -> None:
    """Add to the bias of a matrix what makes up for missing channels; there may be none yet."""
    if left.bias is None:
        return
    name = reader.removesuffix("weight") + "bias"
    before = vectors[name].float() if name in vectors else 0.0
    vectors[name] = (before + left.bias).to(dtype)


def _as_channels(weight: Weight, writer: Writer, trunk: Trunk) -> Tensor:
    """A writer's rows, those of one channel side by side: [channels, in · folds], each row as often as it is read."""
    matrix = weight.unpack(torch.float32)
    channels = trunk.num_units * trunk.unit
    folded = matrix.reshape(writer.folds, trunk.num_units, writer.rows, matrix.shape[1]).permute(1, 2, 0, 3)
    rows = folded.reshape(trunk.num_units, writer.rows, -1)
    times = trunk.unit // writer.rows
    return rows.repeat_interleave(times, dim=1).reshape(channels, -1)


def check_uncompressed(model: Model, method: WidthMethod) -> None:
    """Refuse a model of which something in the blocks is compressed.

    Raises:
        ValueError: it is; says what to do.
    """
    check_whole(model, name_of(method))
    prefix = f"{model.family.blocks}."
    name = next((name for name in model.described if name.startswith(prefix)), None)
    if name is not None:
        raise ValueError(f"{name} is compressed already; take out neurons and heads first, from the original model")


def _too_few(model: Model, method: WidthMethod, mlp: Trunk, freed: int) -> str:
    """Why no neurons would be left, and what to set instead."""
    unit = _unit_entries(model, mlp)
    gone = (freed + (mlp.num_units - method.multiple_of) * unit) * model.num_blocks
    least = ceil(100 * (model.num_parameters - gone) / whole(model).num_parameters) / 100
    return (
        f"keep={method.keep} leaves fewer than {method.multiple_of} of {mlp.num_units} neurons, and their number is a "
        f"multiple of {method.multiple_of}: set keep to {least:.2f} at least, or multiple_of to less"
    )


def _unit_entries(model: Model, trunk: Trunk) -> int:
    """Entries that go with one unit."""
    matrices = [trunk.reader, *(writer.slot for writer in trunk.writers)]
    return sum(prod(_shape(model, slot)) for slot in matrices) // trunk.num_units


def _shape(model: Model, slot: Slot) -> tuple[int, int]:
    out, cols = model.shape(model.prefix(0) + slot.name)
    return out, cols

"""A model without some of its blocks, or without the attention or MLP of some, is a view of the whole one."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from decoct.arch import Slot
from decoct.arch.hf import layer_settings
from decoct.methods.depth import Cut, Cuts, Part
from decoct.model import Model
from decoct.weights import Padded, Sparse, Weight, describe

SUBLAYERS: tuple[Part, ...] = ("attn", "mlp")


@dataclass(frozen=True)
class ShallowModel(Model):
    """What is left of `base`; its blocks are numbered anew.

    A block keeps its place in the tables that a config has for single blocks (sliding windows, position embeddings).

    Attributes:
        base: the model as it was.
        cuts: what is taken out.
    """

    base: Model = field(kw_only=True)
    cuts: Cuts = field(kw_only=True)

    @classmethod
    def of(cls, base: Model, cuts: Cuts) -> "ShallowModel":
        """Take cuts out of a model."""
        view = cls(base.source, base.family, {}, base.lineage, base.cache, base=base, cuts=merged(cuts))
        described = {name: base.described[view.base_name(name)] for name in view.names_of(base.described)}
        for block in range(len(view.kept)):
            for slot in view.missing_slots(block):
                name = view.prefix(block) + slot.name
                described[name] = describe(_nothing(base.shape(view.base_name(name)), base.dtype))
        return cls(base.source, base.family, described, base.lineage, base.cache, base=base, cuts=merged(cuts))

    @cached_property
    def kept(self) -> tuple[int, ...]:
        """The base's number of each block."""
        return tuple(block for block in range(self.base.num_blocks) if Cut(block) not in self.cuts)

    @property
    @override
    def config(self) -> dict[str, Any]:
        before = self.base.config
        found = {**before, self.family.num_blocks_key: len(self.kept)}
        for key, values in layer_settings(before, self.base.num_blocks).items():
            found[key] = [values[block] for block in self.kept]
        return found

    @property
    @override
    def nbytes(self) -> int:
        total = self.base.nbytes
        for block in range(self.base.num_blocks):
            gone = [cut for cut in self.cuts if cut.block == block]
            if Cut(block) in gone:
                total -= self.base.nbytes_under(self.base.prefix(block))
            else:
                lost = [self.base.prefix(block) + slot.name for cut in gone for slot in slots_of(self.base, cut.part)]
                total -= sum(
                    self.base.nbytes_under(name) - _nothing(self.base.shape(name), self.dtype).nbytes for name in lost
                )
        return total

    def base_name(self, name: str) -> str:
        """What the base calls a tensor."""
        blocks = f"{self.family.blocks}."
        if not name.startswith(blocks):
            return name
        number, _, rest = name.removeprefix(blocks).partition(".")
        return f"{blocks}{self.kept[int(number)]}.{rest}"

    def names_of(self, base_names: Iterable[str]) -> list[str]:
        """What is called how here, of what the base has; without what is taken out."""
        numbers = {str(block): str(number) for number, block in enumerate(self.kept)}
        blocks, found = f"{self.family.blocks}.", []
        for name in base_names:
            number, _, rest = name.removeprefix(blocks).partition(".")
            if not name.startswith(blocks):
                found.append(name)
            elif number in numbers:
                found.append(f"{blocks}{numbers[number]}.{rest}")
        return found

    def missing_slots(self, block: int) -> list[Slot]:
        """The slots of a block that is left whose sublayer is taken out."""
        gone = [cut.part for cut in self.cuts if cut.block == self.kept[block]]
        return [slot for part in gone for slot in slots_of(self.base, part)]

    @override
    def shape(self, name: str) -> tuple[int, ...]:
        return self.base.shape(self.base_name(name))

    @override
    def weight(self, name: str) -> Weight:
        if name in self._emptied:
            out, cols = self.shape(name)
            return _nothing((out, cols), self.dtype)
        return self.base.weight(self.base_name(name))

    @override
    def tensor(self, name: str) -> Tensor:
        found = self.base.tensor(self.base_name(name))
        # What the sublayer adds to the stream is its last matrix's product and bias: both must be nothing.
        return torch.zeros_like(found) if name.removesuffix("bias") + "weight" in self._emptied else found

    @override
    def prefetch(self, block: int) -> None:
        self.base.prefetch(self.kept[block] if block < len(self.kept) else self.base.num_blocks)

    @cached_property
    def _emptied(self) -> set[str]:
        return {self.prefix(b) + slot.name for b in range(len(self.kept)) for slot in self.missing_slots(b)}

    @cached_property
    @override
    def _stored(self) -> dict[str, str]:
        return {name: self.base._stored[self.base_name(name)] for name in self.names_of(self.base._stored)}  # noqa: SLF001


def merged(cuts: Cuts) -> Cuts:
    """The same with each block whose attention and MLP are both out as a whole block, and nothing said twice."""
    blocks = {cut.block for cut in cuts}
    found = set()
    for block in blocks:
        parts = {cut.part for cut in cuts if cut.block == block}
        if "block" in parts or parts >= set(SUBLAYERS):
            found.add(Cut(block))
        else:
            found |= {Cut(block, part) for part in parts}
    return frozenset(found)


def slots_of(model: Model, part: Part) -> list[Slot]:
    """The matrices of a block's attention or MLP; of all of the block's."""
    prefixes = {"block": ("",), "attn": ("attn.",), "mlp": ("mlp.", "moe.")}[part]
    return [slot for slot in model.block_slots if slot.role.startswith(prefixes) and not slot.protected]


def is_nothing(description: dict[str, Any]) -> bool:
    """Whether a described weight stores no entry at all: its sublayer was taken out."""
    return bool(description["kind"] == Sparse.kind and description["values"]["shape"] == [0])


def check_whole(model: Model, step: str) -> None:
    """Refuse a model whose blocks lack an attention, an MLP or some neurons that the config still says are there.

    Args:
        model: what the step would begin with.
        step: the step's name, for the message.

    Raises:
        ValueError: such a block; says what to do.
    """
    for name, description in model.described.items():
        if is_nothing(description):
            raise ValueError(
                f"{name} was taken out of its block, or may be, and {step} needs whole blocks; leave {step} out, or "
                "take whole blocks out (sleb)"
            )
        if description["kind"] == Padded.kind:
            raise ValueError(
                f"{name} has lost neurons unevenly, and {step} needs blocks as the config has them; leave {step} or "
                "uneven out"
            )


def _nothing(shape: tuple[int, ...], dtype: torch.dtype) -> Sparse:
    out, cols = shape
    empty = torch.zeros(1, 1, dtype=dtype).expand(out, cols)
    return Sparse.of(empty, torch.zeros(1, 1, dtype=torch.bool).expand(out, cols))

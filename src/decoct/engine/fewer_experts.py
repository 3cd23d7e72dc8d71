"""A mixture with fewer experts in every block: what that makes of its config and shapes, and of one block."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from decoct.arch import Slot
from decoct.arch.hf import all_settings
from decoct.engine.block import Block, Step
from decoct.engine.reshaped import Reshaped
from decoct.methods.experts import ExpertMethod, ExpertStat
from decoct.model import Model
from decoct.weights import Dense, Weight

_COUNTS = ("num_local_experts", "num_experts")  # what configs call the number of experts; some have both
_ROUTER = "moe.router"


@dataclass(frozen=True)
class FewerExperts(Reshaped):
    """A model whose blocks have as many experts each, but fewer.

    Attributes:
        method: how it is made.
        num_kept: experts of each block.
    """

    method: ExpertMethod = field(kw_only=True)
    num_kept: int = field(kw_only=True)

    @classmethod
    def of(cls, base: Model, method: ExpertMethod) -> "FewerExperts":
        """Take experts out of a model as a method says.

        Raises:
            ValueError: it has none, too few would stay, or they are compressed already.
        """
        count = num_experts(base)
        if not count:
            raise ValueError(
                f"a {base.family.name} block has no experts that could go; take out neurons, heads or blocks instead"
            )
        changed = [slot.name for slot in base.block_slots if _changes(slot)]
        for block in range(base.num_blocks):
            name = next((base.prefix(block) + n for n in changed if base.prefix(block) + n in base.described), None)
            if name is not None:
                raise ValueError(f"{name} is compressed already; take out experts first, from the original model")
        kept = method.num_kept(count, num_per_token(base))
        given: tuple[Any, ...] = (base.source, base.family, base.described, base.lineage, base.cache)
        return cls(*given, base=base, method=method, num_kept=kept)

    @property
    @override
    def config(self) -> dict[str, Any]:
        before = self.base.config
        return {**before, **{key: self.num_kept for key in _COUNTS if key in before}}

    @override
    def shape(self, name: str) -> tuple[int, ...]:
        shape = self.base.shape(name)
        slot = self._slot_names.get(name)
        return (self.num_kept, *shape[1:]) if slot is not None and slot.role == _ROUTER else shape

    @property
    @override
    def nbytes(self) -> int:
        before, after = (
            sum(prod(each.shape(each.prefix(0) + slot.name)) for slot in each.block_slots) for each in (self.base, self)
        )
        return self.base.nbytes - (before - after) * self.num_blocks * self.dtype.itemsize

    @override
    def weight(self, name: str) -> Weight:
        if _changes(self.slot(name)):
            raise TypeError(f"{name}: what is left of it shows only in the run")
        return self.base.weight(name)

    @cached_property
    @override
    def _stored(self) -> dict[str, str]:
        gone = self.base.slots().keys() - self.slots().keys()
        return {name: raw for name, raw in self.base._stored.items() if name not in gone}  # noqa: SLF001

    @override
    def expert_stat(self) -> ExpertStat:
        width = self.shape(self.family.embed)[1]
        return self.method.stat(num_experts(self.base), width)

    @override
    def step(self) -> Step:
        return self._reduced

    def _reduced(self, block: Block) -> Block:
        if block.prefix is None:
            return block
        assert block.answers is not None
        try:
            mixture = self.method.mixture(block.answers, self.num_kept)
        except ValueError as error:
            raise ValueError(f"{block.label}: {error}") from error
        experts: dict[tuple[str, int], Weight] = {
            (slot.role, slot.expert): block.weights[name]
            for name, slot in block.slots.items()
            if slot.expert is not None
        }
        weights: dict[str, Weight] = {}
        for slot in self.block_slots:
            name = block.prefix + slot.name
            if slot.expert is not None:
                shares = mixture[slot.expert]
                members = {e: experts[slot.role, e] for e in shares.nonzero()[:, 0].tolist()}
                weights[name] = _mixed(members, shares)
            else:
                weights[name] = _mixed_rows(block.weights[name], mixture) if _changes(slot) else block.weights[name]
        slots = {block.prefix + slot.name: slot for slot in self.block_slots}
        return replace(block, slots=slots, weights=weights)


def num_experts(model: Model) -> int:
    """Experts of each block."""
    return len({slot.expert for slot in model.block_slots if slot.expert is not None})


def num_per_token(model: Model) -> int:
    """Experts that answer each token."""
    return int(all_settings(model.config)["num_experts_per_tok"])


def _changes(slot: Slot) -> bool:
    return slot.expert is not None or slot.role == _ROUTER


def _mixed(members: dict[int, Weight], shares: Float[Tensor, " experts"]) -> Weight:
    """The sum of some experts' matrices; one alone stays the very same."""
    weights = list(members.values())
    if len(weights) == 1:
        return weights[0]
    total = torch.zeros(weights[0].shape)
    for expert, weight in members.items():
        total.add_(weight.unpack(torch.float32), alpha=float(shares[expert]))
    return Dense.of(total.to(weights[0].dtype))


def _mixed_rows(router: Weight, mixture: Float[Tensor, "kept experts"]) -> Weight:
    """The router's rows, summed likewise; in float64, where a row that is taken alone keeps its bits."""
    return Dense.of((mixture @ router.unpack(torch.float64)).to(router.dtype))

"""A model to whose blocks a pass gives other shapes: a view that says which, and how the pass makes them."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from math import prod

from torch import Tensor
from typing_extensions import override

from decoct.engine.block import Step
from decoct.engine.record import Wanted
from decoct.methods.experts import ExpertStat
from decoct.model import Model


@dataclass(frozen=True)
class Reshaped(Model, ABC):
    """Its config and shapes are what they will be; its weights are made block by block in the pass.

    Attributes:
        base: the model as it was.
    """

    base: Model = field(kw_only=True)

    @cached_property
    @override
    def _stored(self) -> dict[str, str]:
        return self.base._stored  # noqa: SLF001

    @override
    def nbytes_under(self, prefix: str) -> int:
        return nbytes_under(self, self.base, prefix)

    @override
    def tensor(self, name: str) -> Tensor:
        return self.base.tensor(name)

    @override
    def prefetch(self, block: int) -> None:
        self.base.prefetch(block)

    @property
    def wanted(self) -> Wanted:
        """Statistics of a block's edges that its step reads."""
        return {}

    def halfway(self) -> "tuple[Reshaped, Wanted] | None":
        """The model after the first part of the step, and statistics of it that the rest reads; None: of one part."""
        return None

    def expert_stat(self) -> ExpertStat | None:
        """What takes the answers of a block's experts, empty; None: its step does not look at them."""
        return None

    @abstractmethod
    def step(self) -> Step:
        """Makes a block of the base into one of this; leaves what lies outside the blocks as it is."""


def nbytes_under(model: Model, base: Model, prefix: str) -> int:
    """Bytes of tensors whose names begin so, in a view of `base` that gives some of them other shapes."""
    names = [name for name in (*model.slots(), *_vectors(model)) if name.startswith(prefix)]
    changed = (name for name in names if model.shape(name) != base.shape(name))
    gained = sum(prod(model.shape(name)) - prod(base.shape(name)) for name in changed)
    return base.nbytes_under(prefix) + gained * model.dtype.itemsize


def _vectors(model: Model) -> list[str]:
    """Norms, biases and the like."""
    inside = [name for block in range(model.num_blocks) for name in model.others(block)]
    return [*model.others(None), *inside]

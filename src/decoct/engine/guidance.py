"""Token weights for guided statistics: which slots have any, and the files that hold them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from decoct.engine.activations import Activations
from decoct.engine.rules import Assignment, Resolved
from decoct.methods import ByGroup
from decoct.model import Model


@dataclass(frozen=True, slots=True)
class Layout:
    """Which slots are guided, and by how many groups each.

    Attributes:
        groups: for every block, the slots' names within it and their numbers of groups, in the order of the file.
    """

    groups: tuple[Mapping[str, int], ...]

    @property
    def first(self) -> int:
        """The first block that has any: gradients need not go further back."""
        return next(block for block, found in enumerate(self.groups) if found)

    @property
    def columns(self) -> int:
        """Weights of a token, over all blocks."""
        return sum(sum(found.values()) for found in self.groups)


def layout(model: Model, steps: tuple[Resolved, ...]) -> Layout | None:
    """The guided slots of a pass; None if there are none.

    Raises:
        ValueError: steps that guide one slot by different numbers of groups.
    """
    found: list[dict[str, int]] = [{} for _ in range(model.num_blocks)]
    for step in steps:
        if not isinstance(step, Assignment):
            continue
        for block, groups in enumerate(found):
            for slot in model.block_slots:
                method = step.methods.get(model.prefix(block) + slot.name)
                if method is None or not isinstance(method.stat, ByGroup):
                    continue
                wanted = method.stat.groups
                if groups.setdefault(slot.name, wanted) != wanted:
                    raise ValueError(f"{model.prefix(block)}{slot.name}: give guided the same number in every step")
    return Layout(tuple(found)) if any(found) else None


class Guidance:
    """Token weights on disk.

    Attributes:
        layout: whose.
    """

    def __init__(self, found: Layout, shape: tuple[int, int], folder: Path) -> None:
        """Describe them.

        Args:
            found: the guided slots.
            shape: (sequences, tokens) of the calibration.
            folder: where the files lie.
        """
        self.layout, self._shape, self._folder = found, shape, folder

    def file(self, block: int) -> Activations:
        """A block's weights, [sequences, tokens, columns]."""
        shape = (*self._shape, sum(self.layout.groups[block].values()))
        return Activations(self._folder, shape, torch.float32, in_memory=False, name="guidance")

    def read(self, block: int, start: int, stop: int) -> dict[str, Float[Tensor, "tokens groups"]]:
        """The weights of the tokens of sequences [start, stop), by the slot's name within the block.

        Raises:
            ValueError: the file is gone or has another size.
        """
        groups = self.layout.groups[block]
        if not groups:
            return {}
        columns = self.file(block).resume(block).read(start, stop).flatten(0, 1)
        return dict(zip(groups, columns.split_with_sizes(list(groups.values()), dim=1), strict=True))

"""What finding the token weights of guided statistics, and gathering with them, will take, before anything runs."""

from dataclasses import dataclass
from math import prod

import torch

from decoct.engine.budget import product_rate
from decoct.engine.data import Data
from decoct.engine.gradients import LOGITS_AT_ONCE
from decoct.engine.guidance import Layout, layout
from decoct.engine.rules import Resolved
from decoct.model import Model

_LOGIT_BYTES = 6 * 4  # of each logit: itself, its softmax, gradients, temporaries


@dataclass(frozen=True, slots=True)
class GuidancePlan:
    """What finding token weights, and gathering statistics with them, will take.

    Attributes:
        model: as the pass finds it.
        layout: the guided slots.
    """

    model: Model
    layout: Layout

    def scratch_bytes(self, data: Data, dtype: torch.dtype, activations: int) -> int:
        """Most on disk at a time: token weights; while they are found, what enters each block and two gradients.

        Args:
            data: calibration.
            dtype: what blocks run in.
            activations: what the pass itself puts there afterwards; what entered the first guided block, and the
                gradient by it, are still there then.
        """
        state = data.num_tokens * self.model.shape(self.model.family.embed)[1] * dtype.itemsize
        weights = 4 * data.num_tokens * self.layout.columns
        return weights + max((self.model.num_blocks + 3) * state, activations + 2 * state)

    def working_bytes(self, data: Data, dtype: torch.dtype) -> int:
        """Memory at the peak of finding them: a block that is kept for its gradient, or the head and some logits."""
        model, size = self.model, dtype.itemsize
        shapes = [model.shape(model.prefix(0) + slot.name) for slot in model.block_slots]
        widths = sum(sum(model.shape(model.prefix(0) + s.name)) for s in model.block_slots if s.expert in (None, 0))
        entries = sum(map(prod, shapes))
        block = entries * (model.dtype.itemsize + size) + 8 * max(map(prod, shapes))
        block += 4 * data.sequence_length * widths * max(size, 4)
        vocabulary, hidden = model.shape(model.end_slots[-1].name)
        head = vocabulary * hidden * (model.dtype.itemsize + size)
        head += _LOGIT_BYTES * max(vocabulary, min(LOGITS_AT_ONCE, data.sequence_length * vocabulary))
        return max(block, head)

    def seconds(self, data: Data, dtype: torch.dtype) -> float:
        """A rough estimate: two forwards and the way back for hidden states alone, and a product for each group."""
        model = self.model
        products = 8.0 * model.num_parameters * data.num_tokens / (0.5 * product_rate(dtype))
        squares = sum(
            groups * model.shape(model.prefix(block) + name)[1] ** 2
            for block, found in enumerate(self.layout.groups)
            for name, groups in found.items()
        )
        return float(products + data.num_tokens * squares / product_rate(torch.float32))


def guided_plan(model: Model, steps: tuple[Resolved, ...]) -> GuidancePlan | None:
    """The plan of a pass's token weights; None if nothing is guided.

    Raises:
        ValueError: as for `layout`.
    """
    found = layout(model, steps)
    return None if found is None else GuidancePlan(model, found)

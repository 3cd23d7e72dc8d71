"""What learning a model's rotations will take, before anything runs."""

from dataclasses import dataclass
from math import prod

import torch

from decoct.engine.budget import product_rate
from decoct.engine.data import Data
from decoct.engine.rotate import RotatedModel, rotation_workspace
from decoct.methods.rotate.spinquant import SpinQuant
from decoct.model import Model

LOGITS_AT_ONCE = 1 << 25
"""Entries of the logits that are held in float32 at a time."""

_LOGIT_BYTES = 16  # of each logit: itself, its softmax, the gradient, a temporary
_GRAPH = 6  # tensors of a token's features that a block with rounded inputs keeps for its gradient


@dataclass(frozen=True, slots=True)
class LearningPlan:
    """A model whose rotations are learned.

    Attributes:
        model: in the basis where learning starts.
        method: settings.
    """

    model: RotatedModel
    method: SpinQuant

    def working_bytes(self, data: Data, dtype: torch.dtype) -> int:
        """Memory of a step at its peak: hidden states, the turns, and the larger of a block and the head."""
        model, size = self.model, dtype.itemsize
        tokens = self.method.batch_size * data.sequence_length
        shapes = {slot: model.shape(model.prefix(0) + slot.name) for slot in model.block_slots}
        entries, features = sum(map(prod, shapes.values())), sum(map(sum, shapes.values()))
        reading = max(rotation_workspace(model, slot, (out, cols)) for slot, (out, cols) in shapes.items())
        block = entries * (2 * size + model.dtype.itemsize) + max(reading, 8 * max(map(prod, shapes.values())))
        block += _GRAPH * tokens * features * max(size, 4)
        vocabulary, width = model.shape(model.end_slots[-1].name)
        head = vocabulary * width * (3 * size + 8) + rotation_workspace(model, model.end_slots[-1], (vocabulary, width))
        head += _LOGIT_BYTES * max(vocabulary, min(LOGITS_AT_ONCE, data.sequence_length * vocabulary))
        return (model.num_blocks + 4) * tokens * width * size + max(block, head) + 8 * self.checkpoint_bytes

    def seconds(self, data: Data, dtype: torch.dtype) -> float:
        """A rough estimate: two forwards and two backwards, reading all matrices twice in another basis, the steps."""
        model, width = self.model, self.model.shape(self.model.family.embed)[1]
        tokens = self.method.batch_size * data.sequence_length
        products = 8.0 * model.num_parameters * tokens / (0.5 * product_rate(dtype))
        turning = (8.0 * width * model.num_parameters + 20.0 * width**3) / product_rate(torch.float32)
        return self.method.num_steps * (products + turning)

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of the turns, float64."""
        turns = (self.model.basis.residual, *self.model.basis.values)
        return sum(8 * len(turn) ** 2 for turn in turns if turn is not None)


def learning(model: Model) -> LearningPlan | None:
    """The plan of learning a model's rotations; None if they are not learned.

    Raises:
        ValueError: LayerNorms or experts, of which the gradients would be wrong; says what to do.
    """
    if not isinstance(model, RotatedModel) or not isinstance(model.method, SpinQuant):
        return None
    if any(slot.expert is not None for slot in model.block_slots):
        raise ValueError("spinquant does not learn on a mixture of experts; use quarot")
    if model.method.residual and model.stream.centred:
        raise ValueError("spinquant learns on models with RMSNorm; use quarot, or set residual: false")
    return LearningPlan(model, model.method)

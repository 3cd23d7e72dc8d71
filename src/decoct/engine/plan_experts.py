"""What leaving a mixture fewer experts will take, before anything runs."""

from math import prod

import torch

from decoct.engine.budget import Budget, product_rate
from decoct.engine.data import Data
from decoct.engine.fewer_experts import FewerExperts, num_experts, num_per_token
from decoct.engine.plan import Plan
from decoct.engine.plan_reshaped import Costs, batch_bytes, computed_in, plan_reshaped
from decoct.engine.runner import block_nbytes
from decoct.methods.experts import ExpertMethod
from decoct.model import Model

_COPIES = 2  # of a block in the dtype it runs in: transformers' fused tensors, and what they are stacked from
_MIDDLES = 4  # of one expert on one batch: gate and up in one tensor, what becomes of gate, the product


def plan_experts(
    model: Model, method: ExpertMethod, data: Data, budget: Budget, dtype: torch.dtype | None = None
) -> tuple[Plan, FewerExperts]:
    """Predict what choosing or merging experts takes, and what is left.

    Args:
        model: what the stage begins with.
        method: settings.
        data: calibration.
        budget: limits.
        dtype: what to run blocks in; None: whatever this machine does fastest.

    Raises:
        ValueError: no experts, too few that would stay, a calibration that is too long, or too little memory.
    """
    left = FewerExperts.of(model, method)
    dtype = computed_in(model, dtype, needs_data=True)
    costs = Costs(_working(left, data, dtype), _seconds(left, data, dtype))
    return plan_reshaped(left, method, costs, data, budget, dtype), left


def _working(left: FewerExperts, data: Data, dtype: torch.dtype) -> int:
    """The block as it was and as it becomes, in the dtype it runs in, and one expert's answers to a batch."""
    model, count = left.base, num_experts(left.base)
    width = model.shape(model.family.embed)[1]
    stored = block_nbytes(model) + block_nbytes(left)
    running = _COPIES * block_nbytes(model) // model.dtype.itemsize * dtype.itemsize
    answers = max(data.sequence_length, 2048) * (_MIDDLES * _expert_width(model) * dtype.itemsize + 8 * width)
    ends = prod(model.shape(model.family.embed)) * dtype.itemsize
    return (
        stored + running + batch_bytes(model, data, dtype) + answers + ends + left.method.stat.nbytes_for(count, width)
    )


def _seconds(left: FewerExperts, data: Data, dtype: torch.dtype) -> float:
    """Two runs of the calibration text, and the experts' answers once more: to their own tokens, or to all."""
    model, count = left.base, num_experts(left.base)
    experts = sum(
        prod(model.shape(model.prefix(0) + slot.name)) for slot in model.block_slots if slot.expert is not None
    )
    share = num_per_token(model) / count
    active = model.num_parameters - (1 - share) * experts * model.num_blocks
    asked = (1.0 if left.method.stat.everywhere else share) * experts * model.num_blocks
    return 2.0 * data.num_tokens * (2 * active + asked) / (0.4 * product_rate(dtype)) + 2 * model.nbytes / 1e9


def _expert_width(model: Model) -> int:
    """Neurons of one expert."""
    down = next(slot for slot in model.block_slots if slot.role == "moe.down")
    return model.shape(model.prefix(0) + down.name)[1]

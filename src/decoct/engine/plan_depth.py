"""What taking blocks out of a model will take, before anything runs."""

from math import prod

import torch

from decoct.arch import Slot
from decoct.engine.budget import Budget, compute_dtype, format_size, product_rate, resident_bytes
from decoct.engine.data import Data, check_length, writing_bytes
from decoct.engine.plan import FIXED, MARGIN, Group, Plan
from decoct.engine.plan_bridge import COPIES, bridge_bytes, bridge_seconds, check_bridge, states_bytes
from decoct.engine.runner import running_nbytes
from decoct.engine.shallow import SUBLAYERS, ShallowModel, slots_of
from decoct.methods import name_of
from decoct.methods.depth import DepthMethod
from decoct.model import Model

_HIDDEN_STATES = 6  # of one batch inside a block: its parts that live at a time, roughly
_LOGITS = 4 * (4 << 24)  # those that are compared at a time, float32, a few copies


def plan_depth(
    model: Model, method: DepthMethod, data: Data, budget: Budget, dtype: torch.dtype | None = None
) -> tuple[Plan, ShallowModel]:
    """Predict what choosing, refitting and writing take, and what is about to be left.

    Args:
        model: what the stage begins with.
        method: settings.
        data: calibration.
        budget: limits.
        dtype: what to run blocks in; None: whatever this machine does fastest.

    Returns:
        The plan, and the model with as much taken out as will be, if not the same blocks.

    Raises:
        ValueError: too few blocks, a calibration that is too long, or too little memory.
    """
    _check(model, method)
    check_length(data, model)
    dtype = dtype or compute_dtype(model.dtype)
    left = ShallowModel.of(model, method.guess(model.num_blocks))
    width = model.shape(model.family.embed)[1]
    states = min(method.num_sequences, data.num_sequences) * data.sequence_length * width * dtype.itemsize
    fixed = _fixed(model, data, dtype, width)
    choosing = fixed + (2 + method.window) * states
    limit = budget.host_limit()
    room = limit / MARGIN - resident_bytes() - FIXED
    at_once = max(1, int((room - choosing) // max(states, 1)))
    at_once = min(at_once, method.candidates(model.num_blocks) or 1)
    needed, in_memory = choosing + at_once * states, True
    if method.bridge:  # refitted once the choice is made
        in_memory = fixed + bridge_bytes(model, method, data, dtype, in_memory=True) <= room
        needed = max(needed, fixed + bridge_bytes(model, method, data, dtype, in_memory=in_memory))
    peak = int(MARGIN * (resident_bytes() + FIXED + needed))
    if peak > limit:
        raise ValueError(
            f"{model.source.label} needs about {format_size(peak)} of memory to try what can be taken out, the budget "
            f"allows {format_size(limit)}; raise budget.host, or set data.num_sequences to less"
        )
    once = 2.0 * model.num_parameters * min(method.num_sequences, data.num_sequences) * data.sequence_length
    seconds = once * method.passes(model.num_blocks) / (0.4 * product_rate(dtype))
    plan = Plan(
        kind=name_of(method),
        steps=(),
        groups=(_group(model, method),),
        num_parameters=left.num_parameters,
        needs_data=True,
        dtype=dtype,
        in_memory=in_memory,
        peak_bytes=peak,
        limit_bytes=limit,
        output_bytes=left.nbytes,
        seconds=seconds + (bridge_seconds(model, method, data, dtype) if method.bridge else 0.0),
        scratch_bytes=COPIES * states_bytes(model, data, dtype) if method.bridge else 0,
        described=left.described,
        share_left=left.nbytes / model.nbytes,
    )
    return plan, left


def _check(model: Model, method: DepthMethod) -> None:
    """Refuse a model that blocks cannot be taken out of, or not so many, or whose gaps cannot be bridged."""
    method.check(model.num_blocks)
    if model.config.get("scale_attn_by_inverse_layer_idx"):
        raise ValueError("this model scales attention by each block's number, so none can be taken out; take neurons")
    if method.bridge:
        check_bridge(model, method)


def candidates_at_once(plan: Plan, model: Model, method: DepthMethod, data: Data) -> int:
    """How many candidates' hidden states the plan's memory holds."""
    width = model.shape(model.family.embed)[1]
    states = min(method.num_sequences, data.num_sequences) * data.sequence_length * width * plan.dtype.itemsize
    room = plan.limit_bytes / MARGIN - resident_bytes() - FIXED - _fixed(model, data, plan.dtype, width)
    room -= (2 + method.window) * states
    return max(1, min(int(room // max(states, 1)), method.candidates(model.num_blocks) or 1))


def _fixed(model: Model, data: Data, dtype: torch.dtype, width: int) -> int:
    """A block, the embedding or head, logits, and the hidden states of one batch."""
    ends = prod(model.shape(model.family.embed)) * dtype.itemsize
    batch = _HIDDEN_STATES * max(data.sequence_length, 2048) * width * dtype.itemsize
    return max(running_nbytes(model, dtype) + ends + _LOGITS + batch, writing_bytes(data, model))


def _group(model: Model, method: DepthMethod) -> Group:
    """What the method's guess takes out; attentions and MLPs that go apart count as whole blocks by their size."""
    entries = {part: sum(_entries(model, slot) for slot in slots_of(model, part)) for part in SUBLAYERS}
    entries["block"] = sum(_entries(model, slot) for slot in model.block_slots)
    gone = sum(entries[cut.part] for cut in method.guess(model.num_blocks))
    return Group("blocks", round(gone / entries["block"]), gone, (method,))


def _entries(model: Model, slot: Slot) -> int:
    return prod(model.shape(model.prefix(0) + slot.name))

"""What tuning a whole model will take, before anything runs: the largest of the moments of one step, and a rate."""

from math import prod

import torch

from decoct.engine.budget import Budget, compute_dtype, format_size, product_rate, resident_bytes
from decoct.engine.data import Data, check_length, writing_bytes
from decoct.engine.plan import FIXED, Group, Plan
from decoct.engine.rehearse import held_weight
from decoct.engine.tune import LOGITS_AT_ONCE, vectors
from decoct.methods import EdgeScaling, LinearMethod, Rotation
from decoct.methods.quantize.e2e_qp import E2EQP
from decoct.model import Model
from decoct.weights import Shared

_MARGIN = 1.2  # gradients of many sizes come and go, so more lies scattered than in a streamed pass; runs differ by 0.1
_STATE_BYTES = 5 * 4  # of each tuned entry, float32: its unit, its change, two moments, its gradient
_SAVED_BYTES = 3 * 4  # of each tuned entry in a checkpoint: its change and two moments
_UNPACKING_BYTES = 16  # of each entry of the matrix that is being unpacked, or whose gradient is pulled back
_LOGIT_BYTES = 7 * 4  # of each logit: the two models' own and a soft cap's, two softmaxes, their ratio, the gradient


def plan_tuning(
    model: Model,
    teacher: Model,
    method: E2EQP,
    data: Data,
    budget: Budget,
    earlier: tuple[Plan, ...],
    dtype: torch.dtype | None = None,
) -> Plan:
    """Predict what tuning takes.

    Args:
        model: in the shapes that it has by then.
        teacher: what the recipe begins with, whose predictions are wanted.
        method: settings.
        data: calibration.
        budget: limits.
        earlier: the recipe's stages before this one.
        dtype: what to run blocks in; None: whatever this machine does fastest.

    Raises:
        ValueError: nothing to tune or to compare with, a calibration that is too long for the model, or too little
            memory.
    """
    _check(model, earlier)
    check_length(data, model)
    made, dtype = earlier[-1], dtype or compute_dtype(model.dtype)
    tuned = sum(made.reals.values())
    if method.norms:
        tuned += sum(prod(model.shape(name)) for name in vectors(model))
    steps = max(_one_step(model, method, data, made, dtype), _teaching(teacher, method, data, dtype))
    held = teacher.num_parameters * dtype.itemsize + made.output_bytes + made.unpacked_bytes
    working = max(held + _STATE_BYTES * tuned + steps, writing_bytes(data, model))
    limit = budget.host_limit()
    peak = int(_MARGIN * (resident_bytes() + FIXED + working))
    if peak > limit:
        raise ValueError(
            f"e2e_qp holds the whole model in memory: {model.source.label} needs about {format_size(peak)}, the budget "
            f"allows {format_size(limit)}; raise budget.host, or leave e2e_qp out"
        )
    entries = sum(prod(model.shape(name)) for name in made.reals)
    return Plan(
        kind="e2e_qp",
        steps=(),
        groups=(Group("all compressed", len(made.reals), entries, (method,)),),
        num_parameters=model.num_parameters,
        needs_data=True,
        dtype=dtype,
        in_memory=True,
        peak_bytes=peak,
        limit_bytes=limit,
        output_bytes=made.output_bytes,
        reals=made.reals,
        unpacked_bytes=made.unpacked_bytes,
        seconds=_operations(model, teacher, method, data) / (0.5 * product_rate(dtype)),
        checkpoint_bytes=2 * _SAVED_BYTES * tuned,  # the next one is written before the last one goes
    )


def _check(model: Model, earlier: tuple[Plan, ...]) -> None:
    """Refuse what cannot be tuned, or only against itself."""
    passes = [plan for plan in earlier if plan.kind == "blocks"]  # others change which matrices there are
    steps = (method for plan in passes for group in plan.groups for method in group.methods)
    compresses = any(not isinstance(method, EdgeScaling | Rotation) for method in steps)
    if model.described and not compresses:
        raise ValueError(
            f"{model.source.label} is compressed already, and e2e_qp would compare it with itself; put e2e_qp into the "
            "recipe that compresses the original, after the stage that does it"
        )
    if not compresses:
        raise ValueError(
            "e2e_qp has nothing to tune: no stage before it compresses anything; put it after one that does"
        )
    made = (method for plan in earlier for group in plan.groups for method in group.methods)
    held = (held_weight(model, name) for name in model.described)
    if any(isinstance(method, LinearMethod) and method.quantizes_inputs for method in made) or any(
        weight is not None and weight.quantizes_inputs for weight in held
    ):
        raise ValueError(
            "e2e_qp tunes matrices for inputs as they are; put the step that rounds inputs into a blocks stage after it"
        )
    shared = [name for name, description in model.described.items() if description["kind"] == Shared.kind]
    if shared:
        raise ValueError(f"{shared[0]} is shared with another matrix, which e2e_qp cannot tune; leave e2e_qp out")


def _one_step(model: Model, method: E2EQP, data: Data, made: Plan, dtype: torch.dtype) -> int:
    """Bytes that one step takes at its peak: hidden states, and whichever of block, head and embedding needs most."""
    size = dtype.itemsize
    names = {model.prefix(0) + slot.name: slot for slot in model.block_slots}
    tokens = method.batch_size * data.sequence_length
    hidden = (model.num_blocks + 4) * tokens * model.shape(model.family.embed)[1] * size
    entries = {name: prod(model.shape(name)) for name in names}
    # A fused tensor of experts is put together from their matrices, and its gradient taken apart again.
    fused = 2 * sum(entries[name] for name, slot in names.items() if slot.expert is not None)
    gradients = sum(entries[name] for name in names if name in made.reals)
    graph = 4 * tokens * _features(model)
    block = (sum(entries.values()) + fused + gradients + graph) * size + _UNPACKING_BYTES * max(entries.values())
    ends = []
    for slot in model.end_slots:
        matrix = prod(model.shape(slot.name))
        ends.append(matrix * size)
        if slot.name in made.reals:
            ends[-1] += matrix * (2 * size + _UNPACKING_BYTES)
    vocabulary = model.shape(model.end_slots[-1].name)[0]
    ends[-1] += _LOGIT_BYTES * max(vocabulary, min(LOGITS_AT_ONCE, data.sequence_length * vocabulary))
    return hidden + max(block, *ends)


def _teaching(teacher: Model, method: E2EQP, data: Data, dtype: torch.dtype) -> int:
    """Bytes that the teacher's forward pass takes: its hidden states, and one of its blocks' own."""
    tokens = method.batch_size * data.sequence_length
    return (2 * teacher.shape(teacher.family.embed)[1] + _features(teacher)) * tokens * dtype.itemsize


def _operations(model: Model, teacher: Model, method: E2EQP, data: Data) -> float:
    """Of every matrix entry and token: a product in the model imitated; in the other two forwards and two backwards."""
    entries = 8.0 * _entries(model) + 2.0 * _entries(teacher)
    return entries * method.batch_size * data.sequence_length * method.num_steps


def _entries(model: Model) -> float:
    """Of all the matrices that a token is multiplied with."""
    chosen, experts = _experts(model)
    return sum(
        prod(model.shape(name)) * (1.0 if slot.expert is None else chosen / experts)
        for name, slot in model.slots().items()
        if slot.role != "embed" or model.tied
    )


def _features(model: Model) -> int:
    """Inputs and outputs that a token has in all matrices of a block; of experts, in those that it is sent to."""
    chosen, _ = _experts(model)
    found = 0
    for slot in model.block_slots:
        if slot.expert in (None, 0):
            found += sum(model.shape(model.prefix(0) + slot.name)) * (1 if slot.expert is None else chosen)
    return found


def _experts(model: Model) -> tuple[int, int]:
    """Experts that a token is sent to, and experts in all; (1, 1) in a model without."""
    numbers = {slot.expert for slot in model.block_slots if slot.expert is not None}
    return (int(model.config["num_experts_per_tok"]), len(numbers)) if numbers else (1, 1)

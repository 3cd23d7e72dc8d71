"""What training will take, before anything runs: the largest of the moments of one step, and a rate."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from decoct.engine.budget import compute_dtype, format_size, product_rate, resident_bytes
from decoct.engine.data import SELF, Data, check_length, check_source, writing_bytes
from decoct.engine.plan import FIXED, Group, Plan
from decoct.engine.stages import Before
from decoct.losses.chunks import AT_ONCE
from decoct.methods.quantize.qat import QAT
from decoct.methods.training import TrainingMethod
from decoct.model import Model
from decoct.training.text import TEACHER, length_of, source_of
from decoct.training.views.choose import changes_form, corrections, is_end, vector_names
from decoct.weights import QuantizedInput, Shared, described_kinds, tensor_specs

_MARGIN = 1.2  # gradients of many sizes come and go, so more lies scattered than in a streamed pass
_STATE_BYTES = 4 * 4  # of each trained number, float32: its value, its gradient, two moments
_SAVED_BYTES = 3 * 4  # of each trained number in a checkpoint: its value and two moments
_UNPACKING_BYTES = 16  # of each entry of the matrix that is being unpacked, or whose gradient is pulled back
_LOGIT_ARRAYS = 8  # of the size of the logits that are held at a time, float32
_KEPT = 6  # of each input and output of a block's matrices, what the gradient wants kept, in the compute dtype


@dataclass(frozen=True, slots=True)
class Numbers:
    """What a stage trains and holds.

    Attributes:
        trained: numbers that have a gradient and moments.
        held: bytes of the weights as they are held.
        output_bytes: of the result.
        reals: of each compressed slot's weight.
    """

    trained: int
    held: int
    output_bytes: int
    reals: dict[str, int]


def numbers_of(before: Before, method: TrainingMethod) -> Numbers:
    """What a stage trains of weights in the form that they have by then."""
    model = before.model
    reals = dict(before.plans[-1].reals) if before.plans else {}
    for name, description in model.described.items():
        specs = tensor_specs(description).values()
        reals.setdefault(name, sum(prod(shape) for dtype, shape in specs if dtype.is_floating_point))
    described = _described(before)
    trained = 0
    for name, slot in model.slots().items():
        if changes_form(method) and not slot.protected:
            each = prod(model.shape(name)) + reals.get(name, 0)
            trained += each if isinstance(method, QAT) else method.rank * sum(model.shape(name))
        elif method.trains("ends" if is_end(model, name) else "matrices"):
            trained += reals.get(name, prod(model.shape(name)))
        elif method.trains("corrections"):
            trained += _correcting(described.get(name))
    if method.trains("norms"):
        trained += sum(prod(model.shape(name)) for name in vector_names(model))
    made = before.plans[-1] if before.plans else None
    output = model.nbytes if made is None else made.output_bytes
    return Numbers(trained, output + (0 if made is None else made.unpacked_bytes), output, reals)


def rounds_inputs(before: Before) -> bool:
    """Whether any weight that the stage will find rounds its inputs."""
    return any(QuantizedInput.kind in described_kinds(each) for each in _described(before).values())


def _described(before: Before) -> Mapping[str, dict[str, Any]]:
    """What is known of the weights that the stage will find."""
    passes = [plan.described for plan in before.plans if plan.described is not None]
    return passes[-1] if passes else before.model.described


def _correcting(description: dict[str, Any] | None) -> int:
    """Numbers in the low-rank terms of a weight."""
    if description is None:
        return 0
    inside, specs = corrections(description), tensor_specs(description).items()
    return sum(prod(shape) for name, (dtype, shape) in specs if name.startswith(inside) and dtype.is_floating_point)


def plan_training(
    before: Before, method: TrainingMethod, teachers: Sequence[Model], numbers: Numbers, groups: tuple[Group, ...]
) -> Plan:
    """Predict what training takes.

    Args:
        before: what the stage begins with.
        method: settings.
        teachers: models that are imitated.
        numbers: what is trained and held.
        groups: what happens, for people.

    Raises:
        ValueError: something that training cannot work on, nothing to train, or too little memory.
    """
    model, data = before.model, before.data
    check_text(before, method)
    if not numbers.trained:
        raise ValueError("nothing of this model is trained; name more in `train`, such as [matrices, norms]")
    dtype = before.dtype or compute_dtype(model.dtype)
    tokens = method.batch_size * length_of(method, data)
    taught = sum(teacher.num_parameters for teacher in teachers) * dtype.itemsize
    fixed = resident_bytes() + FIXED + numbers.held + taught + _STATE_BYTES * numbers.trained
    peaks = {kept: _peak(fixed, model, tokens, dtype, kept=kept) for kept in (True, False)}
    limit = before.budget.host_limit()
    kept = peaks[True] <= limit if method.recompute is None else not method.recompute
    peak = max(peaks[kept], resident_bytes() + FIXED + _writing(method, data, teachers))
    if peak > limit:
        raise ValueError(
            f"training {model.source.label} needs about {format_size(peak)} of memory, the budget allows "
            f"{format_size(limit)}; raise budget.host, set batch_size to less, or train less of it"
        )
    return Plan(
        kind="training",
        steps=(),
        groups=groups,
        num_parameters=model.num_parameters,
        needs_data=method.data is None and source_of(method, data) != TEACHER,
        dtype=dtype,
        in_memory=kept,
        peak_bytes=peak,
        limit_bytes=limit,
        output_bytes=numbers.output_bytes,
        reals=numbers.reals,
        seconds=_seconds(model, teachers, method, tokens, dtype, kept=kept),
        checkpoint_bytes=(2 * _SAVED_BYTES + (8 if method.evaluate_every else 0)) * numbers.trained,
    )


def _writing(method: TrainingMethod, data: Data, teachers: Sequence[Model]) -> int:
    """Bytes that it takes to have the text written."""
    return writing_bytes(Data(source=SELF), teachers[0]) if source_of(method, data) == TEACHER else 0


def check_text(before: Before, method: TrainingMethod) -> None:
    """Refuse a text that is not there, and what the model cannot read or be trained on.

    Raises:
        ValueError: see above.
    """
    model, source = before.model, source_of(method, before.data)
    check_length(before.data.model_copy(update={"sequence_length": length_of(method, before.data)}), model)
    if source != TEACHER:
        check_source(before.data.model_copy(update={"source": source}))
    for name, description in _described(before).items():
        if Shared.kind in described_kinds(description):
            raise ValueError(f"{name} is shared with another matrix, which cannot be trained; leave the stage out")


def _peak(fixed: int, model: Model, tokens: int, dtype: torch.dtype, *, kept: bool) -> int:
    """Bytes at the peak of one step."""
    shapes = [model.shape(model.prefix(0) + slot.name) for slot in model.block_slots]
    entries = sum(prod(shape) for shape in shapes)
    width = model.shape(model.family.embed)[1]
    block = entries * dtype.itemsize + _KEPT * tokens * sum(map(sum, shapes)) * dtype.itemsize // 2
    block += 4 * tokens * width * 4
    matrix = max(prod(shape) for shape in shapes) * _UNPACKING_BYTES
    vocabulary = model.shape(model.end_slots[-1].name)
    head = _LOGIT_ARRAYS * 4 * min(AT_ONCE, tokens * vocabulary[0]) + 3 * 4 * prod(vocabulary)
    states = (model.num_blocks + 6) * tokens * width * 4
    return int(_MARGIN * (fixed + states + (model.num_blocks if kept else 1) * block + max(matrix, head)))


def _seconds(
    model: Model, teachers: Sequence[Model], method: TrainingMethod, tokens: int, dtype: torch.dtype, *, kept: bool
) -> float:
    """Of every matrix entry and token: a product forwards and two backwards, one more to recompute; one in teachers."""
    per_token = (6.0 if kept else 8.0) * model.num_parameters + sum(2.0 * each.num_parameters for each in teachers)
    length = tokens // method.batch_size
    looks = method.steps(length) // method.evaluate_every if method.evaluate_every else 0
    seen = method.steps(length) * method.accumulate * tokens + looks * method.held_out * length / 2
    seconds = per_token * seen / (0.5 * product_rate(dtype))
    return seconds if method.minutes is None else min(seconds, 60.0 * method.minutes)

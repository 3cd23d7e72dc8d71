"""What giving a model's blocks other shapes will take, before anything runs: what all such stages have in common."""

from dataclasses import dataclass
from math import prod

import torch

from decoct.engine.budget import Budget, compute_dtype, format_size, resident_bytes
from decoct.engine.data import Data, check_length, writing_bytes
from decoct.engine.plan import FIXED, MARGIN, Group, Plan
from decoct.engine.rehearse import compressible_shape
from decoct.engine.reshaped import Reshaped
from decoct.engine.thin import whole
from decoct.methods import ModelMethod, name_of
from decoct.model import Model

HIDDEN_STATES = 6  # of one batch inside a block: its parts that live at a time, roughly


@dataclass(frozen=True, slots=True)
class Costs:
    """What only the kind of stage knows.

    Attributes:
        working: bytes that the most demanding part takes while it is worked on, activations apart.
        seconds: of all of it, a rough estimate.
        scratch: bytes on disk that something before the pass takes.
    """

    working: int
    seconds: float
    scratch: int = 0


def computed_in(model: Model, dtype: torch.dtype | None, *, needs_data: bool) -> torch.dtype:
    """What blocks run in, if nothing is said: whatever this machine does fastest."""
    return dtype or (compute_dtype(model.dtype) if needs_data else model.dtype)


def batch_bytes(model: Model, data: Data, dtype: torch.dtype) -> int:
    """Hidden states of one batch, while a block runs on it."""
    return HIDDEN_STATES * max(data.sequence_length, 2048) * model.shape(model.family.embed)[1] * dtype.itemsize


def plan_reshaped(
    left: Reshaped, method: ModelMethod, costs: Costs, data: Data | None, budget: Budget, dtype: torch.dtype
) -> Plan:
    """Predict what the pass takes.

    Args:
        left: the model with the shapes that it will have.
        method: settings.
        costs: of this kind of stage.
        data: calibration; None: it needs none.
        budget: limits.
        dtype: what blocks run in.

    Raises:
        ValueError: a calibration that is too long, or too little memory.
    """
    model = whole(left.base)
    if data is not None:
        check_length(data, model)
    width = model.shape(model.family.embed)[1]
    activations = 0 if data is None else data.num_tokens * width * dtype.itemsize
    working = max(costs.working, 0 if data is None else writing_bytes(data, model))
    limit, base = budget.host_limit(), resident_bytes() + FIXED
    in_memory = int(MARGIN * (base + activations + working)) <= limit
    peak = int(MARGIN * (base + working + (activations if in_memory else 0)))
    if peak > limit:
        raise ValueError(
            f"{model.source.label} needs about {format_size(peak)} of memory to change the shapes of one block at a "
            f"time, the budget allows {format_size(limit)}; raise budget.host"
        )
    return Plan(
        kind=name_of(method),
        steps=(),
        groups=_groups(left, method),
        num_parameters=left.num_parameters,
        needs_data=data is not None,
        dtype=dtype,
        in_memory=in_memory,
        peak_bytes=peak,
        limit_bytes=limit,
        output_bytes=left.nbytes,
        scratch_bytes=max(2 * activations, costs.scratch),
        seconds=costs.seconds,
        described=left.described,
        share_left=left.nbytes / model.nbytes,
    )


def _groups(left: Reshaped, method: ModelMethod) -> tuple[Group, ...]:
    """What loses entries, by role."""
    model = whole(left.base)
    before, after = _entries(model), _entries(left)
    found = []
    for role, sizes in before.items():
        if sum(sizes) != sum(after[role]):
            found.append(Group(role, len(sizes) * model.num_blocks, sum(sizes) * model.num_blocks, (method,)))
    ends = [slot for slot in model.end_slots if left.shape(slot.name) != model.shape(slot.name)]
    found += [Group(slot.role, 1, prod(model.shape(slot.name)), (method,)) for slot in ends]
    return tuple(found)


def _entries(model: Model) -> dict[str, list[int]]:
    """Entries of each matrix of a block, by role."""
    found: dict[str, list[int]] = {}
    for slot in model.block_slots:
        found.setdefault(slot.role, []).append(prod(compressible_shape(model, model.prefix(0) + slot.name)))
    return found

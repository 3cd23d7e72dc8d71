"""What a recipe will do and take, before anything runs: which method meets which slot, memory, disk, time."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from decoct.engine.budget import Budget, compute_dtype, format_size, product_rate, resident_bytes
from decoct.engine.data import SELF, Data, check_length
from decoct.engine.rehearse import Chain, Chains, Sizes, Steps, linear, rehearse
from decoct.engine.rules import Assignment, Method, Rule, assign
from decoct.methods import BlockMethod, ModelMethod
from decoct.model import Model
from decoct.store import free_bytes

StepRules = tuple[Rule, ...] | BlockMethod
"""A step as a recipe gives it: rules for single matrices, or a method for whole blocks."""

FIXED = 260 << 20  # interpreter, torch and transformers once blocks run; beyond what is resident while planning
_TOKENS_AT_ONCE = 2048
MARGIN = 1.1  # allocators keep some of what was freed


@dataclass(frozen=True, slots=True)
class Group:
    """Slots of one role that get the same treatment."""

    role: str
    count: int
    parameters: int
    methods: tuple[Method | BlockMethod | ModelMethod, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """A recipe's stage, resolved against a model and a machine.

    Attributes:
        steps: what each does, resolved.
        groups: what happens, by role; groups without methods are left alone.
        num_parameters: the model's.
        needs_data: whether any method needs calibration tokens.
        dtype: what blocks run in.
        in_memory: whether activations stay in memory.
        peak_bytes: predicted peak of the process's memory.
        limit_bytes: what the budget allows.
        output_bytes: predicted size of the result.
        scratch_bytes: most that activations take on disk at a time.
        seconds: a rough estimate.
        bits_per_weight: predicted, over all parameters.
    """

    steps: tuple[Assignment | BlockMethod, ...]
    groups: tuple[Group, ...]
    num_parameters: int
    needs_data: bool
    dtype: torch.dtype
    in_memory: bool
    peak_bytes: int
    limit_bytes: int
    output_bytes: int
    scratch_bytes: int
    seconds: float

    @property
    def bits_per_weight(self) -> float:
        """Predicted bits for each parameter, everything counted."""
        return 8 * self.output_bytes / self.num_parameters


def make_plan(
    model: Model,
    steps: tuple[StepRules, ...],
    data: Data,
    budget: Budget,
    out: Path | None,
    dtype: torch.dtype | None = None,
) -> Plan:
    """Resolve one streamed pass and predict what it takes.

    Args:
        model: what to compress.
        steps: in order.
        data: calibration.
        budget: limits.
        out: output folder, to look at its disk; None: not looked at.
        dtype: what to run blocks in; None: whatever this machine does fastest.

    Raises:
        ValueError: a rule that matches nothing, shapes or methods that do not fit together, or too little memory or
            disk; each says what to do.
    """
    resolved = _resolve(model, steps)
    rehearsal = rehearse(model, [resolved])
    (chains,) = rehearsal.chains
    paired = any(isinstance(step, BlockMethod) for step in resolved)
    needs_data = paired or any(method.stat is not None for methods in chains.values() for method in methods)
    if needs_data:
        check_length(data, model)
    if dtype is None:
        dtype = compute_dtype(model.dtype) if needs_data else model.dtype
    activations = data.num_tokens * model.shape(model.family.embed)[1] * dtype.itemsize if needs_data else 0
    activations *= 2 if paired else 1  # of the model as it becomes and as it was
    working = _peak_part(model, chains, dtype, data if needs_data else None)
    if needs_data and data.source == SELF:  # the whole model writes the text before the first block
        whole = int(1.2 * model.num_parameters * model.dtype.itemsize)
        working = max(working, whole)
    limit = budget.host_limit()
    base = resident_bytes() + FIXED
    in_memory = int(MARGIN * (base + activations + working)) <= limit
    peak = int(MARGIN * (base + working + (activations if in_memory else 0)))
    if peak > limit:
        raise ValueError(too_large(model, peak, limit, working))
    output = _output_bytes(model, chains, rehearsal.sizes)
    if out is not None:
        check_disk(out, output, budget.scratch, 2 * activations)
    return Plan(
        steps=resolved,
        groups=_groups(model, chains),
        num_parameters=model.num_parameters,
        needs_data=needs_data,
        dtype=dtype,
        in_memory=in_memory,
        peak_bytes=peak,
        limit_bytes=limit,
        output_bytes=output,
        scratch_bytes=2 * activations,
        seconds=_seconds(model, chains, data if needs_data else None, dtype),
    )


def check_stages(model: Model, stages: Iterable[tuple[StepRules, ...]]) -> None:
    """Refuse stages that cannot follow one another, before the first one runs.

    Raises:
        ValueError: as for `make_plan`.
    """
    rehearse(model, [_resolve(model, steps) for steps in stages])


def _resolve(model: Model, steps: tuple[StepRules, ...]) -> Steps:
    return tuple(step if isinstance(step, BlockMethod) else assign(model, step) for step in steps)


def _peak_part(model: Model, chains: Chains, dtype: torch.dtype, data: Data | None) -> int:
    """Bytes that the most demanding part takes while it is worked on."""
    itemsize = model.dtype.itemsize
    prefix = model.prefix(0)
    slots = {prefix + slot.name: slot for slot in model.block_slots}
    entries = sum(prod(model.shape(name)) for name in slots)
    blocks = f"{model.family.blocks}."
    inside = {name: linear(chain) for name, chain in chains.items() if name.startswith(blocks)}
    workspace = max((m.workspace(_matrix(model, name)) for name, chain in inside.items() for m in chain), default=0)
    block = entries * itemsize + int(entries * 1.25)
    if data is not None:
        reads = {model.prefix(i) + slot.name: slot.reads for i in range(model.num_blocks) for slot in model.block_slots}
        kinds = {(reads[name], m.stat) for name, chain in inside.items() for m in chain if m.stat is not None}
        widths_read = {edge: model.shape(readers[0])[1] for edge, readers in _edge_readers(model).items()}
        stats = sum(kind.nbytes_for(widths_read[edge]) for edge, kind in kinds)
        widths = sum(sum(model.shape(name)) for name, slot in slots.items() if slot.expert in (None, 0))
        # A block kept for its gradient holds each matrix's input and output, and as much again between them.
        sequence = 4 * data.sequence_length * widths * dtype.itemsize
        whole = {m for chain in chains.values() for m in chain if isinstance(m, BlockMethod)}
        workspace = max([workspace, *(m.workspace(entries, sequence) for m in whole)])
        block += stats + entries * dtype.itemsize + _TOKENS_AT_ONCE * widths * 4
    ends = 0
    for slot in model.end_slots:
        size = prod(model.shape(slot.name))
        extra = max((m.workspace(_matrix(model, slot.name)) for m in linear(chains[slot.name])), default=0)
        unpacked = 0 if data is None else size * dtype.itemsize
        ends = max(ends, size * itemsize + unpacked + extra)
    return max(block + workspace, ends)


def _matrix(model: Model, name: str) -> tuple[int, int]:
    out, cols = model.shape(name)
    return out, cols


def _edge_readers(model: Model) -> dict[str, list[str]]:
    readers: dict[str, list[str]] = {}
    for slot in model.block_slots:
        readers.setdefault(slot.reads, []).append(model.prefix(0) + slot.name)
    return readers


def _output_bytes(model: Model, chains: Chains, sizes: dict[tuple[Chain, ...], Sizes]) -> int:
    total = float(model.nbytes)
    for name, methods in chains.items():
        if methods and name not in model.described:
            out, cols = _matrix(model, name)
            a, b, c = sizes[methods,]
            total += a * out * cols + b * out + c * cols - out * cols * model.dtype.itemsize
    return max(round(total), 1)


def _seconds(model: Model, chains: Chains, data: Data | None, dtype: torch.dtype) -> float:
    """Two forward passes, the statistics, and the methods' own work, at the rate that products reach here."""
    solving = sum(m.operations(_matrix(model, name)) for name, methods in chains.items() for m in linear(methods))
    full = product_rate(torch.float32)
    seconds = solving / full + 2 * model.nbytes / 1e9
    if data is not None:
        entries = sum(prod(model.shape(n)) for n, slot in model.slots().items() if not slot.protected)
        squares = sum(model.shape(readers[0])[1] ** 2 for readers in _edge_readers(model).values()) * model.num_blocks
        whole = {m for methods in chains.values() for m in methods if isinstance(m, BlockMethod)}
        learning = sum(m.operations(entries, data.num_sequences, data.sequence_length) for m in whole)
        seconds += learning / (0.4 * product_rate(dtype))
        seconds += data.num_tokens * (4 * entries / (0.6 * product_rate(dtype)) + squares / full)
    return float(seconds)


def _groups(model: Model, chains: Chains) -> tuple[Group, ...]:
    counts: Counter[tuple[str, tuple[Method | BlockMethod, ...]]] = Counter()
    sizes: Counter[tuple[str, tuple[Method | BlockMethod, ...]]] = Counter()
    for name, slot in model.slots().items():
        key = (slot.role, chains[name])
        counts[key] += 1
        sizes[key] += prod(model.shape(name))
    return tuple(Group(role, counts[role, methods], sizes[role, methods], methods) for role, methods in counts)


def too_large(model: Model, peak: int, limit: int, working: int) -> str:
    """The message for a model that does not fit into memory."""
    part = "one block" if working else "loading"
    return (
        f"{model.source.label} needs about {format_size(peak)} of memory ({format_size(working)} of it for {part} at a "
        f"time), the budget allows {format_size(limit)}; raise budget.host, or leave lm_head and embedding alone"
    )


def check_disk(out: Path, output: int, scratch: Path | None, scratch_bytes: int) -> None:
    """Refuse what the disk cannot hold.

    Raises:
        ValueError: a place has too little room; says how much is missing where.
    """
    places: Counter[Path] = Counter()
    places[out] += output
    places[scratch or out] += scratch_bytes
    if scratch is not None and _device(scratch) == _device(out):
        places = Counter({out: output + scratch_bytes})
    written = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())  # by the run that is resumed
    places[out] -= min(written, places[out])
    for place, needed in places.items():
        free = free_bytes(place)
        if needed > free:
            raise ValueError(
                f"{place} needs about {format_size(needed)} of disk, {format_size(free)} are free; "
                "free some, or choose another output folder or budget.scratch"
            )


def _device(path: Path) -> int:
    while not path.exists():
        path = path.absolute().parent
    return path.stat().st_dev

"""What a recipe will do and take, before anything runs: which method meets which slot, memory, disk, time."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from decoct.engine.block import apply_method
from decoct.engine.budget import Budget, compute_dtype, format_size, product_rate, resident_bytes
from decoct.engine.data import SELF, Data, check_length
from decoct.engine.folding import check_foldable, folding_operations, folds, touched
from decoct.engine.rules import Assignment, Method, Resolved, Rule, assign, is_paired
from decoct.methods import BlockMethod, EdgeScaling, LinearCorrection, ModelMethod
from decoct.model import Model
from decoct.stats import PairedGram
from decoct.store import free_bytes
from decoct.weights import Dense, Weight

StepRules = tuple[Rule, ...] | BlockMethod | EdgeScaling
"""A step as a recipe gives it: rules for single matrices, or a method for whole blocks or their edges."""

FIXED = 260 << 20  # interpreter, torch and transformers once blocks run; beyond what is resident while planning
_TOKENS_AT_ONCE = 2048
_REHEARSAL_WIDTHS = [*range(128, 1025, 128), *range(96, 769, 96), 2048, 4096]
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

    steps: tuple[Resolved, ...]
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
    chains = _chains(model, resolved)
    _check_shapes(model, chains)
    sizes = {methods: _rehearse(methods, model.dtype) for methods in set(chains.values()) if methods}
    paired = any(is_paired(step) for step in resolved)
    scalings = [step for step in resolved if isinstance(step, EdgeScaling)]
    needs_data = (
        paired or bool(scalings) or any(method.stat is not None for methods in chains.values() for method in methods)
    )
    if needs_data:
        check_length(data, model)
    if dtype is None:
        dtype = compute_dtype(model.dtype) if needs_data else model.dtype
    activations = data.num_tokens * model.shape(model.family.embed)[1] * dtype.itemsize if needs_data else 0
    activations *= 2 if paired else 1  # of the model as it becomes and as it was
    working = _peak_part(model, chains, scalings, dtype, data if needs_data else None)
    if needs_data and data.source == SELF:  # the whole model writes the text before the first block
        working = max(working, int(1.2 * model.num_parameters * model.dtype.itemsize))
    limit = budget.host_limit()
    base = resident_bytes() + FIXED
    in_memory = int(MARGIN * (base + activations + working)) <= limit
    peak = int(MARGIN * (base + working + (activations if in_memory else 0)))
    if peak > limit:
        raise ValueError(too_large(model, peak, limit, working))
    output = _output_bytes(model, chains, sizes)
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
        seconds=_seconds(model, chains, scalings, data if needs_data else None, dtype),
    )


def check_stages(model: Model, stages: Iterable[tuple[StepRules, ...]]) -> None:
    """Refuse stages that cannot follow one another, before the first one runs.

    Raises:
        ValueError: as for `make_plan`.
    """
    by_stage = [_resolve(model, steps) for steps in stages]
    for steps in by_stage:
        _check_shapes(model, _chains(model, steps))
    chains = _chains(model, tuple(step for steps in by_stage for step in steps))
    _check_shapes(model, chains)
    for methods in set(chains.values()):
        if methods:
            _rehearse(methods, model.dtype)


Chains = dict[str, tuple[Method | BlockMethod, ...]]


def _resolve(model: Model, steps: tuple[StepRules, ...]) -> tuple[Resolved, ...]:
    return tuple(assign(model, step) if isinstance(step, tuple) else step for step in steps)


def _chains(model: Model, steps: tuple[Resolved, ...]) -> Chains:
    """Each slot's methods over all steps, in order; a block method is among those of every slot that it touches.

    Raises:
        ValueError: a rescaling of something that is compressed already, or that nothing in the model can take.
    """
    chains: Chains = {}
    rescaled = {model.prefix(b) + name for b in range(model.num_blocks) for name in touched(model)}
    for method in (step for step in steps if isinstance(step, EdgeScaling)):
        check_foldable(model, method)
    for name, slot in model.slots().items():
        found: list[Method | BlockMethod] = []
        for step in steps:
            if isinstance(step, EdgeScaling):
                if name in rescaled and (found or name in model.described):
                    raise ValueError(f"{name}: only dense weights can be rescaled; put the rescaling step first")
            elif isinstance(step, Assignment):
                found += [step.methods[name]] if name in step.methods else []
            elif not slot.protected and step.touches(dense=not found and name not in model.described):
                found.append(step)
        chains[name] = tuple(found)
    return chains


def _check_shapes(model: Model, chains: Chains) -> None:
    for name, methods in chains.items():
        out, cols = model.shape(name)
        leaves: list[tuple[int, int]] = [(out, cols)]
        if methods and name == model.family.embed and any(m.stat is not None for m in methods):
            raise ValueError(f"{name}: an embedding has no input statistics; use a method without data, such as rtn")
        if methods and isinstance(methods[0], LinearCorrection):
            raise ValueError(f"{name}: a correction needs an earlier step that compresses, in the same stage")
        if any(m.stat is PairedGram for m in methods) and model.slots()[name].expert is not None:
            raise ValueError(f"{name}: the two models may route a token differently; give experts another method")
        for method in methods:
            for leaf in leaves:
                try:
                    method.check(leaf)
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from error
            leaves = [found for leaf in leaves for found in method.leaves(leaf)]


Sizes = tuple[float, float, float]
"""Bytes of a compressed matrix as a·out·in + b·out + c·in: codes and masks, scales of rows, low-rank factors."""


def _rehearse(methods: tuple[Method | BlockMethod, ...], dtype: torch.dtype) -> Sizes:
    """Run a chain on small random matrices: refusals show now, not after hours. Gives the sizes it leads to.

    Raises:
        ValueError: a method cannot follow the ones before it.
    """
    unit = next(width for width in _REHEARSAL_WIDTHS if all(_fits(methods, shape) for shape in _trio(width)))
    shapes = _trio(unit)
    terms = torch.tensor([[out * cols, out, cols] for out, cols in shapes], dtype=torch.float64)
    sizes = torch.tensor([_rehearse_once(methods, shape, dtype) for shape in shapes], dtype=torch.float64)
    a, b, c = torch.linalg.solve(terms, sizes).tolist()
    return a, b, c


def _rehearse_once(methods: tuple[Method | BlockMethod, ...], shape: tuple[int, int], dtype: torch.dtype) -> int:
    generator = torch.Generator().manual_seed(0)
    original: Weight = Dense.of(torch.randn(*shape, generator=generator).to(dtype))
    inputs = torch.randn(2 * shape[1], shape[1], generator=generator)
    weight = original
    for method in methods:
        if isinstance(method, BlockMethod):
            weight = method.begin(weight)
            continue
        stat = None
        if method.stat is not None:
            stat = method.stat.empty(shape[1])
            stat.add(inputs)
        weight = apply_method(method, weight, stat, original, "this recipe")
    return weight.nbytes


def _trio(unit: int) -> tuple[tuple[int, int], ...]:
    return (unit, unit), (2 * unit, unit), (unit, 2 * unit)


def _fits(methods: tuple[Method | BlockMethod, ...], shape: tuple[int, int]) -> bool:
    try:
        leaves = [shape]
        for method in methods:
            for leaf in leaves:
                method.check(leaf)
            leaves = [found for leaf in leaves for found in method.leaves(leaf)]
    except ValueError:
        return False
    return True


def _peak_part(model: Model, chains: Chains, scalings: list[EdgeScaling], dtype: torch.dtype, data: Data | None) -> int:
    """Bytes that the most demanding part takes while it is worked on."""
    itemsize = model.dtype.itemsize
    prefix = model.prefix(0)
    slots = {prefix + slot.name: slot for slot in model.block_slots}
    entries = sum(prod(model.shape(name)) for name in slots)
    workspace = max((m.workspace(_matrix(model, n)) for n in slots for m in _linear(chains[n])), default=0)
    blocks = entries * itemsize + int(entries * 1.25)
    if data is not None:
        stats = 0
        for edge, readers in _edge_readers(model).items():
            kinds = {m.stat for name in readers for m in chains[name] if m.stat is not None}
            kinds |= {step.stat for step in scalings if edge in {each.edge for each in folds(model)}}
            width = model.shape(readers[0])[1]
            stats += sum(kind.nbytes_for(width) for kind in kinds) if edge else 0
        widths = sum(sum(model.shape(name)) for name, slot in slots.items() if slot.expert in (None, 0))
        # A block kept for its gradient holds each matrix's input and output, and as much again between them.
        sequence = 4 * data.sequence_length * widths * dtype.itemsize
        whole = {m for name in slots for m in chains[name] if isinstance(m, BlockMethod)}
        workspace = max([workspace, *(m.workspace(entries, sequence) for m in whole)])
        widest = [(sum(model.shape(prefix + n)[0] for n in each.readers), each.width) for each in folds(model)]
        workspace = max([workspace, *(step.workspace(shape) for step in scalings for shape in widest)])
        blocks += stats + entries * dtype.itemsize + _TOKENS_AT_ONCE * widths * 4
    ends = 0
    for slot in model.end_slots:
        size = prod(model.shape(slot.name))
        extra = max((m.workspace(_matrix(model, slot.name)) for m in _linear(chains[slot.name])), default=0)
        unpacked = 0 if data is None else size * dtype.itemsize
        ends = max(ends, size * itemsize + unpacked + extra)
    return max(blocks + workspace, ends)


def _linear(methods: tuple[Method | BlockMethod, ...]) -> list[Method]:
    return [method for method in methods if not isinstance(method, BlockMethod)]


def _matrix(model: Model, name: str) -> tuple[int, int]:
    out, cols = model.shape(name)
    return out, cols


def _edge_readers(model: Model) -> dict[str, list[str]]:
    readers: dict[str, list[str]] = {}
    for slot in model.block_slots:
        readers.setdefault(slot.reads, []).append(model.prefix(0) + slot.name)
    return readers


def _output_bytes(model: Model, chains: Chains, sizes: dict[tuple[Method | BlockMethod, ...], Sizes]) -> int:
    total = float(model.nbytes)
    for name, methods in chains.items():
        if methods and name not in model.described:
            out, cols = _matrix(model, name)
            a, b, c = sizes[methods]
            total += a * out * cols + b * out + c * cols - out * cols * model.dtype.itemsize
    return max(round(total), 1)


def _seconds(model: Model, chains: Chains, scalings: list[EdgeScaling], data: Data | None, dtype: torch.dtype) -> float:
    """Two forward passes, the statistics, and the methods' own work, at the rate that products reach here."""
    solving = sum(m.operations(_matrix(model, name)) for name, methods in chains.items() for m in _linear(methods))
    solving += sum(folding_operations(model, step) for step in scalings)
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

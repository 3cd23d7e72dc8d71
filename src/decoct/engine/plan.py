"""What a recipe will do and take, before anything runs: which method meets which slot, memory, disk, time."""

from collections import Counter
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch

from decoct.engine.block import apply_method
from decoct.engine.budget import Budget, compute_dtype, format_size, product_rate, resident_bytes
from decoct.engine.data import Data, check_length, writing_bytes
from decoct.engine.rules import Assignment, Method, Rule, assign
from decoct.methods import BlockMethod, LinearCorrection, ModelMethod
from decoct.model import Model
from decoct.weights import Dense, Weight, tensor_specs, trainable

StepRules = tuple[Rule, ...] | BlockMethod
"""A step as a recipe gives it: rules for single matrices, or a method for whole blocks."""

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
        kind: "blocks", or the name of the method on the whole model.
        steps: what each does, resolved.
        groups: what happens, by role; groups without methods are left alone.
        num_parameters: the model's.
        needs_data: whether any method needs calibration tokens.
        dtype: what blocks run in.
        in_memory: whether activations stay in memory.
        peak_bytes: predicted peak of the process's memory.
        limit_bytes: what the budget allows.
        output_bytes: predicted size of the result.
        reals: predicted number of real numbers (scales, factors, surviving values) in each compressed slot's weight.
        scratch_bytes: most that activations take on disk at a time.
        seconds: a rough estimate.
        checkpoint_bytes: most that checkpoints of a method on the whole model take in the output folder at a time.
        bits_per_weight: predicted, over all parameters.
    """

    kind: str
    steps: tuple[Assignment | BlockMethod, ...]
    groups: tuple[Group, ...]
    num_parameters: int
    needs_data: bool
    dtype: torch.dtype
    in_memory: bool
    peak_bytes: int
    limit_bytes: int
    output_bytes: int
    reals: dict[str, int]
    scratch_bytes: int
    seconds: float
    checkpoint_bytes: int = 0

    @property
    def bits_per_weight(self) -> float:
        """Predicted bits for each parameter, everything counted."""
        return 8 * self.output_bytes / self.num_parameters


def make_plan(
    model: Model,
    steps: tuple[StepRules, ...],
    data: Data,
    budget: Budget,
    dtype: torch.dtype | None = None,
    earlier: tuple[StepRules, ...] = (),
) -> Plan:
    """Resolve one streamed pass and predict what it takes.

    Args:
        model: what the recipe begins with.
        steps: in order.
        data: calibration.
        budget: limits.
        dtype: what to run blocks in; None: whatever this machine does fastest.
        earlier: the steps of the recipe's passes before this one, which will have changed the model.

    Raises:
        ValueError: a rule that matches nothing, shapes or methods that do not fit together or cannot follow the
            earlier ones, or too little memory; each says what to do.
    """
    resolved = _resolve(model, steps)
    chains, whole = _histories(model, _resolve(model, earlier), resolved)
    rehearsed = {methods: _rehearse(methods, model.dtype) for methods in set(whole.values()) if methods}
    paired = any(isinstance(step, BlockMethod) for step in resolved)
    needs_data = paired or any(method.stat is not None for methods in chains.values() for method in methods)
    if needs_data:
        check_length(data, model)
    if dtype is None:
        dtype = compute_dtype(model.dtype) if needs_data else model.dtype
    activations = data.num_tokens * model.shape(model.family.embed)[1] * dtype.itemsize if needs_data else 0
    activations *= 2 if paired else 1  # of the model as it becomes and as it was
    working = _peak_part(model, chains, dtype, data if needs_data else None)
    working = max(working, writing_bytes(data, model) if needs_data else 0)
    limit = budget.host_limit()
    base = resident_bytes() + FIXED
    in_memory = int(MARGIN * (base + activations + working)) <= limit
    peak = int(MARGIN * (base + working + (activations if in_memory else 0)))
    if peak > limit:
        raise ValueError(_too_large(model, peak, limit, working))
    return Plan(
        kind="blocks",
        steps=resolved,
        groups=_groups(model, chains),
        num_parameters=model.num_parameters,
        needs_data=needs_data,
        dtype=dtype,
        in_memory=in_memory,
        peak_bytes=peak,
        limit_bytes=limit,
        output_bytes=_output_bytes(model, whole, rehearsed),
        reals=_reals(model, whole, rehearsed),
        scratch_bytes=2 * activations,
        seconds=_seconds(model, chains, data if needs_data else None, dtype),
    )


Chains = dict[str, tuple[Method | BlockMethod, ...]]


def _resolve(model: Model, steps: tuple[StepRules, ...]) -> tuple[Assignment | BlockMethod, ...]:
    return tuple(step if isinstance(step, BlockMethod) else assign(model, step) for step in steps)


def _chains(model: Model, steps: tuple[Assignment | BlockMethod, ...]) -> Chains:
    """Each slot's methods over all steps, in order; a block method is among those of every slot that it touches."""
    chains: Chains = {}
    for name, slot in model.slots().items():
        found: list[Method | BlockMethod] = []
        for step in steps:
            if not isinstance(step, BlockMethod):
                found += [step.methods[name]] if name in step.methods else []
            elif not slot.protected and step.touches(dense=not found and name not in model.described):
                found.append(step)
        chains[name] = tuple(found)
    return chains


def _histories(
    model: Model, earlier: tuple[Assignment | BlockMethod, ...], steps: tuple[Assignment | BlockMethod, ...]
) -> tuple[Chains, Chains]:
    """Each slot's methods in a stage alone, and with those of the stages before it; shapes are checked."""
    before, whole = _chains(model, earlier), _chains(model, (*earlier, *steps))
    chains = {name: methods[len(before[name]) :] for name, methods in whole.items()}
    _check_shapes(model, chains)
    _check_shapes(model, whole)
    return chains, whole


def _check_shapes(model: Model, chains: Chains) -> None:
    for name, methods in chains.items():
        out, cols = model.shape(name)
        leaves: list[tuple[int, int]] = [(out, cols)]
        if methods and name == model.family.embed and any(m.stat is not None for m in methods):
            raise ValueError(f"{name}: an embedding has no input statistics; use a method without data, such as rtn")
        if methods and isinstance(methods[0], LinearCorrection):
            raise ValueError(f"{name}: a correction needs an earlier step that compresses, in the same stage")
        for method in methods:
            for leaf in leaves:
                try:
                    method.check(leaf)
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from error
            leaves = [found for leaf in leaves for found in method.leaves(leaf)]


Sizes = tuple[float, float, float]
"""A count for a compressed matrix as a·out·in + b·out + c·in: codes and masks, scales of rows, low-rank factors."""


class Rehearsal(NamedTuple):
    """What a chain of methods makes of a matrix: bytes, and how many real numbers are among what is stored."""

    nbytes: Sizes
    reals: Sizes


def _rehearse(methods: tuple[Method | BlockMethod, ...], dtype: torch.dtype) -> Rehearsal:
    """Run a chain on small random matrices: refusals show now, not after hours. Gives what it leads to.

    Raises:
        ValueError: a method cannot follow the ones before it.
    """
    unit = next(width for width in _REHEARSAL_WIDTHS if all(_fits(methods, shape) for shape in _trio(width)))
    shapes = _trio(unit)
    terms = torch.tensor([[out * cols, out, cols] for out, cols in shapes], dtype=torch.float64)
    made = [_rehearse_once(methods, shape, dtype) for shape in shapes]
    counts = [[weight.nbytes, sum(tensor.numel() for tensor in trainable(weight).values())] for weight in made]
    nbytes, reals = torch.linalg.solve(terms, torch.tensor(counts, dtype=torch.float64)).T.tolist()
    return Rehearsal(tuple(nbytes), tuple(reals))


def _rehearse_once(methods: tuple[Method | BlockMethod, ...], shape: tuple[int, int], dtype: torch.dtype) -> Weight:
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
    return weight


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


def _peak_part(model: Model, chains: Chains, dtype: torch.dtype, data: Data | None) -> int:
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
            width = model.shape(readers[0])[1]
            stats += sum(kind.nbytes_for(width) for kind in kinds) if edge else 0
        widths = sum(sum(model.shape(name)) for name, slot in slots.items() if slot.expert in (None, 0))
        # A block kept for its gradient holds each matrix's input and output, and as much again between them.
        sequence = 4 * data.sequence_length * widths * dtype.itemsize
        whole = {m for name in slots for m in chains[name] if isinstance(m, BlockMethod)}
        workspace = max([workspace, *(m.workspace(entries, sequence) for m in whole)])
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


Rehearsed = dict[tuple[Method | BlockMethod, ...], Rehearsal]


def _output_bytes(model: Model, chains: Chains, rehearsed: Rehearsed) -> int:
    total = float(model.nbytes)
    for name, methods in chains.items():
        if methods and name not in model.described:
            out, cols = _matrix(model, name)
            total += _count(rehearsed[methods].nbytes, (out, cols)) - out * cols * model.dtype.itemsize
    return max(round(total), 1)


def _reals(model: Model, chains: Chains, rehearsed: Rehearsed) -> dict[str, int]:
    found = {}
    for name, methods in chains.items():
        if name in model.described:
            specs = tensor_specs(model.described[name]).values()
            found[name] = sum(prod(shape) for dtype, shape in specs if dtype.is_floating_point)
        elif methods:
            found[name] = round(_count(rehearsed[methods].reals, _matrix(model, name)))
    return found


def _count(sizes: Sizes, shape: tuple[int, int]) -> float:
    out, cols = shape
    return sizes[0] * out * cols + sizes[1] * out + sizes[2] * cols


def _seconds(model: Model, chains: Chains, data: Data | None, dtype: torch.dtype) -> float:
    """Two forward passes, the statistics, and the methods' own work, at the rate that products reach here."""
    solving = sum(m.operations(_matrix(model, name)) for name, methods in chains.items() for m in _linear(methods))
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


def _too_large(model: Model, peak: int, limit: int, working: int) -> str:
    """The message for a model that does not fit into memory."""
    part = "one block" if working else "loading"
    return (
        f"{model.source.label} needs about {format_size(peak)} of memory ({format_size(working)} of it for {part} at a "
        f"time), the budget allows {format_size(limit)}; raise budget.host, or leave lm_head and embedding alone"
    )

"""What a search will do and take, before anything runs; targets that cannot be met are refused here."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from decoct.engine.budget import Budget, format_size, product_rate, resident_bytes
from decoct.engine.data import Data, check_length, check_source
from decoct.engine.gradients import LOGITS_AT_ONCE
from decoct.engine.plan import FIXED, MARGIN, Plan, make_plan
from decoct.engine.stages import BlocksStage, Stage
from decoct.model import Model
from decoct.search.measure import STATES_BYTES
from decoct.search.sensitivity import GRADIENTS_BYTES
from decoct.search.settings import Level, Search
from decoct.search.solve import check_solver
from decoct.search.target import Target, find_target
from decoct.store import free_bytes

_LIST = {"bits": "widths", "sparsity": "levels"}  # the setting that says what to choose from
_ABOVE = 1.01  # times the most bits that can be had: what messages round up is not refused
_UNPACKED = 2e8  # entries a second that are read, unpacked and compared with a gradient


@dataclass(frozen=True, slots=True)
class SearchPlan:
    """A search, resolved against a model and a machine.

    Attributes:
        target: what is searched.
        dtype: what blocks run in while statistics are gathered.
        least_bits: the smallest average that can be had, everything that the searched matrices store counted.
        most_bits: the largest.
        wanted_bits: the average that is aimed at; of a sparsity, what it takes if all matrices get it.
        wanted_sparsity: the fraction to be removed; None where bits or bytes are aimed at.
        wanted: bytes for the searched matrices; of a sparsity, weights that are kept.
        alike: the level that meets the target if all matrices get it: the largest result of those that do.
        other_bytes: of the result's tensors that are not searched.
        peak_bytes: predicted peak of the process's memory.
        limit_bytes: what the budget allows.
        disk_bytes: most that the search's files take at a time.
        seconds: a rough estimate.
    """

    target: Target
    dtype: torch.dtype
    least_bits: float
    most_bits: float
    wanted_bits: float
    wanted_sparsity: float | None
    alike: Level
    wanted: int
    other_bytes: int
    peak_bytes: int
    limit_bytes: int
    disk_bytes: int
    seconds: float


def plan_search(
    model: Model,
    stages: tuple[Stage, ...],
    data: Data,
    budget: Budget,
    search: Search,
    dtype: torch.dtype | None = None,
) -> SearchPlan:
    """Find what is searched, and predict what it takes.

    Args:
        model: what the recipe begins with.
        stages: the recipe's.
        data: calibration; a search needs it even where the recipe's methods do not.
        budget: limits.
        search: the target.
        dtype: what to gather statistics in; None: whatever this machine does fastest.

    Raises:
        ValueError: nothing to choose, a target out of reach, too little memory, or scipy is not installed; each says
            what to do.
    """
    check_solver()
    check_length(data, model)
    check_source(data)
    target = find_target(model, stages, search)
    stage = stages[target.stage]
    assert isinstance(stage, BlocksStage)
    base = make_plan(model, stage.steps, data, budget, dtype)
    sizes = {level: sum(target.sizes(level).values()) for level in target.levels}
    amounts = sizes if search.sparsity is None else {level: target.weights_kept(level) for level in target.levels}
    other = _other_bytes(target, base)
    wanted = _wanted(search, other, target.entries, amounts)
    fitting = [level for level, amount in amounts.items() if amount <= wanted]
    alike = fitting[-1] if fitting else target.levels[0]
    found = SearchPlan(
        target=target,
        dtype=base.dtype,
        least_bits=8 * min(sizes.values()) / target.entries,
        most_bits=8 * max(sizes.values()) / target.entries,
        wanted_bits=search.bits or 8 * (wanted if search.sparsity is None else sizes[alike]) / target.entries,
        wanted_sparsity=search.sparsity,
        alike=alike,
        wanted=wanted,
        other_bytes=other,
        peak_bytes=_peak(target, base, search, data),
        limit_bytes=base.limit_bytes,
        disk_bytes=_disk(target, base, data, search, sizes.values()),
        seconds=_seconds(target, base, data, search),
    )
    budget_for(search, found, (min(amounts.values()), max(amounts.values())), both=True)
    if found.peak_bytes > found.limit_bytes:
        raise ValueError(
            f"{model.source.label}: searching needs about {format_size(found.peak_bytes)} of memory, the budget allows "
            f"{format_size(found.limit_bytes)}; raise budget.host, or write {search.setting} into the recipe yourself"
        )
    return found


def budget_for(search: Search, plan: SearchPlan, reach: tuple[int, int], *, both: bool = False) -> int:
    """Bytes that the searched matrices may take together; of a sparsity, the weights that they may keep.

    Args:
        search: the target.
        plan: what else the result holds.
        reach: the fewest and the most that they can take.
        both: refuse also more than the most; once the candidates are made, they are taken as they are.

    Raises:
        ValueError: the target is below the fewest, or above the most.
    """
    entries, levels = plan.target.entries, plan.target.levels
    above = both and plan.wanted > _ABOVE * reach[1]
    if plan.wanted >= reach[0] and not above:
        return plan.wanted
    if search.sparsity is not None:
        level, amount, change = (levels[-1], reach[1], "smaller") if above else (levels[0], reach[0], "larger")
        raise ValueError(
            f"a sparsity of {search.sparsity:g} cannot be met: with {level:g} everywhere "
            f"{1 - amount / entries:.4f} of the weights go; give a {change} one in search.levels"
        )
    each = "{:g} bits" if plan.target.setting == "bits" else "a sparsity of {:g}"
    first, last = each.format(levels[0]), each.format(levels[-1])
    if search.size is None:
        low, high = (f"{8 * nbytes / entries:.2f}" for nbytes in reach)
        raise ValueError(
            f"{search.bits:g} bits cannot be met: with scales and all else counted these matrices take {low} bits per "
            f"weight with {first} each, {high} with {last}; "
            + (f"ask for at most {high}" if above else f"ask for more than {low}, or choose larger groups")
        )
    low, high = (format_size(plan.other_bytes + nbytes) for nbytes in reach)
    if above:
        raise ValueError(
            f"{format_size(search.size)} is more than the result can take: {high} with {last} for each searched "
            "matrix; leave --size out, or give a smaller one"
        )
    raise ValueError(
        f"{format_size(search.size)} cannot be met: the result takes {low} with {first} for each searched "
        f"matrix, {high} with {last}, {format_size(plan.other_bytes)} of it for all else; "
        f"ask for more than {low}"
    )


def check_room(plan: SearchPlan, out: Path, folder: Path) -> None:
    """Refuse what the disk cannot hold.

    Args:
        plan: the search's.
        out: the result's folder.
        folder: the search's; what is there already need not be free.

    Raises:
        ValueError: too little room; says how much is missing.
    """
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    free = free_bytes(out)
    if plan.disk_bytes - there > free:
        raise ValueError(
            f"{out} needs about {format_size(plan.disk_bytes - there)} of disk for the search, {format_size(free)} are "
            f"free; free some, choose another output folder, or fewer search.{_LIST[plan.target.setting]}"
        )


def _wanted(search: Search, other: int, entries: int, amounts: Mapping[Level, int]) -> int:
    """Bytes for the searched matrices; of a sparsity, weights that are kept, as the method rounds that level."""
    if search.sparsity is not None:
        return max(round((1 - search.sparsity) * entries), amounts.get(search.sparsity, 0))
    if search.bits is not None:
        return int(search.bits * entries / 8)
    assert search.size is not None
    return search.size - other


def _other_bytes(target: Target, base: Plan) -> int:
    """What the result holds beside the searched matrices."""
    return base.output_bytes - sum(target.sizes().values())


def _disk(target: Target, base: Plan, data: Data, search: Search, sizes: Iterable[int]) -> int:
    """Candidates; hidden states, two parts' at a time of all calibration, or all parts' of some of it."""
    model = target.model
    width = model.shape(model.family.embed)[1]
    streamed = 2 * data.num_tokens * width * base.dtype.itemsize
    swept = (model.num_blocks + 3) * _num_sequences(search, data) * data.sequence_length * width * 4
    return sum(sizes) + max(streamed, swept)


def _peak(target: Target, base: Plan, search: Search, data: Data) -> int:
    model = target.model
    prefix = model.prefix(0)
    block = sum(prod(model.shape(prefix + slot.name)) for slot in model.block_slots)
    largest = max(prod(model.shape(name)) for name in model.slots())
    head = prod(model.shape(model.family.embed))
    loaded = resident_bytes() + FIXED
    activations = base.scratch_bytes // 2 if base.in_memory else 0  # a search keeps them on disk
    making = int(base.peak_bytes / MARGIN) - loaded - activations + _candidates_of_a_block(target)
    widths = sum(sum(model.shape(prefix + slot.name)) for slot in model.block_slots if slot.expert in (None, 0))
    running = 4 * 4 * data.sequence_length * widths  # as a block kept for its gradient: see the estimate of a pass
    waiting = max(4 * block, min(GRADIENTS_BYTES, 4 * block * _num_sequences(search, data)))
    gradients = 8 * block + waiting + 12 * largest + running
    rows, width = model.shape(model.family.embed)
    logits = 3 * 4 * head + 6 * 4 * min(LOGITS_AT_ONCE, data.sequence_length * rows)
    state = search.held_out(data.num_sequences) * data.sequence_length * width * 4
    side_by_side = max(2 * state, min(STATES_BYTES, 2 * max(search.offspring, len(target.levels)) * state))
    measuring = 4 * block + side_by_side + state + max(4 * running, logits) if search.num_measured else 0
    return int(MARGIN * (loaded + max(making, gradients, logits, measuring)))


def _candidates_of_a_block(target: Target) -> int:
    """Bytes of one block's matrices at all levels; of the embedding, if that is more."""
    parts: Counter[str] = Counter()
    for level in target.levels:
        for name, nbytes in target.sizes(level).items():
            inside = name.startswith(f"{target.model.family.blocks}.")
            parts[name.removeprefix(f"{target.model.family.blocks}.").split(".", 1)[0] if inside else name] += nbytes
    return max(parts.values())


def _seconds(target: Target, base: Plan, data: Data, search: Search) -> float:
    """The streamed pass with every width, gradients and their products with candidates, and true measurements."""
    model = target.model
    full = product_rate(torch.float32)
    blocks = sum(prod(model.shape(name)) for name, slot in model.slots().items() if not slot.protected)
    whole = blocks + prod(model.shape(model.family.embed))
    solving = sum(
        method.operations((model.shape(name)[0], model.shape(name)[1]))
        for level in target.levels
        for step in target.steps(level)
        for name, method in step.methods.items()
    )
    count, length = _num_sequences(search, data), data.sequence_length
    seconds = base.seconds + solving / full
    seconds += 8 * count * length * whole / (0.5 * full) + len(target.levels) * count * target.entries / _UNPACKED
    if search.num_measured:
        measured = min(search.num_measured, search.held_out(data.num_sequences))
        roles = len({tie.role for tie in target.ties})
        quick, slow = search.offspring * max(1, measured // 4), (max(1, search.offspring // 4)) * measured
        runs = roles * len(target.levels) * measured + search.generations * (quick + slow)
        seconds += runs * length * (2 * blocks * 0.7 + 4 * (whole - blocks)) / (0.6 * full)
    return float(seconds)


def _num_sequences(search: Search, data: Data) -> int:
    return min(search.num_sequences, search.held_out(data.num_sequences))

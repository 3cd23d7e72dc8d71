"""What a recipe's stage will do and take, before anything runs: which method meets which slot, memory, time."""

from collections import Counter
from dataclasses import dataclass, field
from math import prod

import torch

from decoct.engine.allocate import allocation_plan
from decoct.engine.budget import Budget, compute_dtype, format_size, resident_bytes
from decoct.engine.data import Data, check_length, writing_bytes
from decoct.engine.estimate import Work, peak_part, time_taken
from decoct.engine.expect import Described, expected_weights
from decoct.engine.folding import touched
from decoct.engine.gains import normed
from decoct.engine.plan_basis import learning
from decoct.engine.plan_guidance import guided_plan
from decoct.engine.rehearse import Chains, Rehearsal, Steps, compressible_shape, left_dense, rehearse
from decoct.engine.rotate import check_rotation, rotated, signs_nbytes, turned_slots
from decoct.engine.rules import Resolved, Rule, assign, is_paired
from decoct.methods import AnyMethod, BlockStep, EdgeScaling, GainRefit
from decoct.model import Model
from decoct.weights import tensor_specs

StepRules = tuple[Rule, ...] | BlockStep
"""A step as a recipe gives it: rules for single matrices, or a method for whole blocks, their edges, or the basis."""

FIXED = 300 << 20  # interpreter, torch and transformers once blocks run; beyond what is resident while planning
MARGIN = 1.1  # allocators keep some of what was freed


@dataclass(frozen=True, slots=True)
class Group:
    """Slots of one role that get the same treatment, rescaling included."""

    role: str
    count: int
    parameters: int
    methods: tuple[AnyMethod, ...]


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
        seconds: a rough estimate.
        reals: predicted number of real numbers (scales, factors, surviving values) in each compressed slot's weight.
        unpacked_bytes: predicted bytes that those weights take more while they are trained.
        scratch_bytes: most that activations take on disk at a time.
        checkpoint_bytes: most that checkpoints of a method on the whole model take in the output folder at a time.
        described: of a pass: predicted descriptions of all weights that will not be dense then; None: they show only
            in the run.
        bits_per_weight: predicted, over all parameters.
        share_left: of the parameters, where the stage takes some out; None: it takes out none.
        notes: what a user should know beside the figures, a line each.
    """

    kind: str
    steps: tuple[Resolved, ...]
    groups: tuple[Group, ...]
    num_parameters: int
    needs_data: bool
    dtype: torch.dtype
    in_memory: bool
    peak_bytes: int
    limit_bytes: int
    output_bytes: int
    seconds: float
    reals: dict[str, int] = field(default_factory=dict)
    unpacked_bytes: int = 0
    scratch_bytes: int = 0
    checkpoint_bytes: int = 0
    described: Described | None = None
    share_left: float | None = None
    notes: tuple[str, ...] = ()

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
    earlier: tuple[tuple[StepRules, ...], ...] = (),
) -> Plan:
    """Resolve one streamed pass and predict what it takes.

    Args:
        model: what the recipe begins with, in the basis that earlier stages set.
        steps: in order.
        data: calibration.
        budget: limits.
        dtype: what to run blocks in; None: whatever this machine does fastest.
        earlier: the steps of each of the recipe's passes before this one, which will have changed the model.

    Raises:
        ValueError: a rule that matches nothing, shapes or methods that do not fit together or cannot follow the
            earlier ones, or too little memory; each says what to do.
    """
    check_rotation(model, steps, [_resolve(model, stage) for stage in earlier])
    model = rotated(model, steps)
    resolved = _resolve(model, steps)
    rehearsal = rehearse(model, [*(_resolve(model, stage) for stage in earlier), resolved])
    chains, paired = rehearsal.chains[-1], any(is_paired(step) for step in resolved)
    scalings = tuple(step for step in resolved if isinstance(step, EdgeScaling))
    reading = any(method.stat is not None for methods in chains.values() for method in methods)
    learns = learning(model) if turned_slots(model, resolved) else None  # an earlier stage's are learned by then
    allocates = allocation_plan(model, resolved)
    needs_data = paired or bool(scalings) or reading or learns is not None or allocates is not None
    if needs_data:
        check_length(data, model)
    dtype = dtype or (compute_dtype(model.dtype) if needs_data else model.dtype)
    work = Work(model, chains, scalings, _refits(resolved), paired, data if needs_data else None, dtype)
    activations = _activations(model, data, dtype, 2 if paired else 1) if needs_data else 0
    guides = guided_plan(model, resolved)
    before = [each for each in (learns, guides, allocates) if each is not None]  # they run the whole model beforehand
    working = max(peak_part(work), writing_bytes(data, model) if needs_data else 0)
    working = max([working, *(each.working_bytes(data, dtype) for each in before)])
    in_memory, peak = _memory(model, budget, activations, working)
    return Plan(
        kind="blocks",
        steps=resolved,
        groups=_groups(model, resolved, chains),
        num_parameters=model.num_parameters,
        needs_data=needs_data,
        dtype=dtype,
        in_memory=in_memory,
        peak_bytes=peak,
        limit_bytes=budget.host_limit(),
        output_bytes=_output_bytes(model, rehearsal),
        reals=_reals(model, rehearsal),
        unpacked_bytes=_unpacked_bytes(model, rehearsal),
        scratch_bytes=2 * activations if guides is None else guides.scratch_bytes(data, dtype, 2 * activations),
        seconds=time_taken(work) + sum(each.seconds(data, dtype) for each in before),
        checkpoint_bytes=2 * learns.checkpoint_bytes if learns is not None else 0,
        described=expected_weights(model, rehearsal),
    )


def _activations(model: Model, data: Data, dtype: torch.dtype, chains: int) -> int:
    """Bytes of the hidden states between two blocks: of the model as it becomes and, in a second chain, as it was."""
    return chains * data.num_tokens * model.shape(model.family.embed)[1] * dtype.itemsize


def _memory(model: Model, budget: Budget, activations: int, working: int) -> tuple[bool, int]:
    """Whether activations stay in memory, and the predicted peak; refuses what the budget does not allow."""
    limit, base = budget.host_limit(), resident_bytes() + FIXED
    in_memory = int(MARGIN * (base + activations + working)) <= limit
    peak = int(MARGIN * (base + working + (activations if in_memory else 0)))
    if peak > limit:
        raise ValueError(_too_large(model, peak, limit, working))
    return in_memory, peak


def _refits(steps: Steps) -> bool:
    return any(isinstance(step, GainRefit) for step in steps)


def _resolve(model: Model, steps: tuple[StepRules, ...]) -> Steps:
    return tuple(assign(model, step) if isinstance(step, tuple) else step for step in steps)


def _output_bytes(model: Model, rehearsal: Rehearsal) -> int:
    total = float(model.nbytes)
    for name, slot in model.slots().items():
        made = rehearsal.made(name)
        if made is not None and left_dense(model, name):
            out, cols = compressible_shape(model, name)
            total += made.nbytes.of(out, cols) - out * cols * model.dtype.itemsize - signs_nbytes(model, slot, cols)
    return max(round(total), 1)


def _reals(model: Model, rehearsal: Rehearsal) -> dict[str, int]:
    found = {}
    for name in model.slots():
        made = rehearsal.made(name)
        if name in model.described and (made is None or not left_dense(model, name)):
            specs = tensor_specs(model.described[name]).values()
            found[name] = sum(prod(shape) for dtype, shape in specs if dtype.is_floating_point)
        elif made is not None:
            found[name] = round(made.reals.of(*compressible_shape(model, name)))
    return found


def _unpacked_bytes(model: Model, rehearsal: Rehearsal) -> int:
    total = 0.0
    for name in model.slots():
        made = rehearsal.made(name)
        total += 0.0 if made is None else made.unpacked.of(*compressible_shape(model, name))
    return round(total)


def _groups(model: Model, steps: Steps, chains: Chains) -> tuple[Group, ...]:
    scalings = tuple(step for step in steps if isinstance(step, EdgeScaling))
    counts: Counter[tuple[str, tuple[AnyMethod, ...]]] = Counter()
    sizes: Counter[tuple[str, tuple[AnyMethod, ...]]] = Counter()
    rescaled, turned = touched(model), turned_slots(model, steps)
    refits = tuple(step for step in steps if isinstance(step, GainRefit))
    read = {reader for each in normed(model) for reader in each.readers} if refits else set()
    for name, slot in model.slots().items():
        before: tuple[AnyMethod, ...] = (*turned.get(name, ()), *(scalings if slot.name in rescaled else ()))
        key = (slot.role, (*before, *chains[name], *(refits if slot.name in read else ())))
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

"""Tries a recipe's methods on small random matrices: refusals show now, not after hours, and sizes are known."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from decoct.arch import Slot
from decoct.engine.block import apply_method
from decoct.engine.folding import check_foldable, touched
from decoct.engine.gains import check_gains
from decoct.engine.rotate import online_roles, signs_nbytes
from decoct.engine.rules import Assignment, Method, Resolved, reads_pairs
from decoct.engine.shallow import check_whole
from decoct.methods import BlockMethod, ByGroup, EdgeScaling, LinearCorrection, Rotation, name_of
from decoct.model import Model
from decoct.ops.grid import GroupSizeError, stored_scale_dtype
from decoct.weights import Dense, Padded, Rotated, Weight, describe, for_training, rebuild, tensor_specs, trainable

Steps = tuple[Resolved, ...]
"""The steps of one stage."""

Chain = tuple[Method | BlockMethod, ...]
"""What one stage does to one slot, in order."""

Chains = dict[str, Chain]
"""By the slot's full name."""

Shape = tuple[int, int]

_WIDTHS = [*range(128, 1025, 128), *range(96, 769, 96), 2048, 4096]


@dataclass(frozen=True, slots=True)
class Sizes:
    """A count for a compressed matrix: codes and masks, scales of rows, low-rank factors."""

    entries: float
    rows: float
    cols: float

    def of(self, out: int, cols: int) -> float:
        """For a matrix of this shape."""
        return self.entries * out * cols + self.rows * out + self.cols * cols


class Made(NamedTuple):
    """What chains of methods make of a matrix.

    Attributes:
        nbytes: bytes.
        reals: how many real numbers are among what is stored.
        unpacked: bytes that it takes more while it is trained.
        quantizes_inputs: whether its inputs are rounded.
        forms: descriptions of what they make of three shapes: square, twice as tall, twice as wide.
    """

    nbytes: Sizes
    reals: Sizes
    unpacked: Sizes
    quantizes_inputs: bool
    forms: tuple[tuple[Shape, dict[str, Any]], ...]


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """What came of it.

    Attributes:
        chains: for each stage, each slot's methods; a block method is among those of the slots that it works on.
        sizes: what a slot's chains over all stages make of an uncompressed matrix, by the slot's full name.
    """

    chains: tuple[Chains, ...]
    sizes: dict[str, Made]

    def made(self, name: str) -> Made | None:
        """What all stages make of a slot; None if none of them touches it."""
        return self.sizes[name] if any(chains[name] for chains in self.chains) else None


@dataclass(frozen=True, slots=True)
class _Verdict:
    """What a method will do with a slot.

    Attributes:
        method: which.
        obstacle: why a block method leaves the slot alone; None: it works on it.
        reshapes: whether it stores the matrix in another form, so that the matrix's shape matters.
    """

    method: Method | BlockMethod
    obstacle: str | None = None
    reshapes: bool = True


_Verdicts = tuple[tuple[_Verdict, ...], ...]


@dataclass(frozen=True, slots=True)
class _Start:
    """What a slot's methods begin with.

    Attributes:
        dtype: of the matrix.
        held: what an earlier run made of it, without its values; None: it is uncompressed.
        turned: whether its inputs are rotated while the model runs.
    """

    dtype: torch.dtype
    held: Weight | None
    turned: bool

    def of_shape(self, shape: Shape, generator: torch.Generator) -> Weight:
        """A random one."""
        dense = Dense.of(torch.randn(*shape, generator=generator).to(self.dtype))
        if isinstance(self.held, Padded):  # the shape is the corner's: that is what methods work on
            cut = [has < room for has, room in zip(self.held.inner.shape, self.held.shape, strict=True)]
            return Padded.of(dense, (shape[0] * (1 + cut[0]), shape[1] * (1 + cut[1])))
        return (
            Rotated.of(dense, None, torch.ones(shape[1], dtype=stored_scale_dtype(self.dtype)))
            if self.turned
            else dense
        )


class _MisfitError(ValueError):
    """A method does not fit a small matrix's shape."""


def rehearse(model: Model, stages: Sequence[Steps]) -> Rehearsal:
    """Try every chain of methods that the stages make for some slot.

    Raises:
        ValueError: shapes or methods that do not fit together, or a block method that finds nothing to work on.
    """
    courses = _courses(model, stages)
    _check_rescalings(model, stages)
    check_gains(model, stages)
    for name, course in courses.items():
        _check_shapes(model, name, [_Verdict(method) for chain in course for method in linear(chain)], courses)
    tried: dict[tuple[tuple[Chain, ...], str, bool], tuple[_Verdicts, Made]] = {}
    found: dict[str, _Verdicts] = {}
    sizes: dict[str, Made] = {}
    slots = model.slots()
    for name, course in courses.items():
        held, turned = held_weight(model, name), signs_nbytes(model, slots[name], 1) > 0
        key = (course, "" if held is None else _structure(held), turned)
        if key not in tried:
            tried[key] = _try(course, _Start(model.dtype, held, turned), name)
        found[name], sizes[name] = tried[key]
        _check_shapes(model, name, [verdict for stage in found[name] for verdict in stage], courses)
        if sizes[name].quantizes_inputs:
            _check_inputs(model, name)
        _check_order(model, name, tuple(_kept(stage) for stage in found[name]))
    _check_used(found, len(stages))
    chains = tuple({name: _kept(verdicts[n]) for name, verdicts in found.items()} for n in range(len(stages)))
    return Rehearsal(chains, sizes)


def linear(chain: Chain) -> list[Method]:
    """A chain's methods on single matrices."""
    return [method for method in chain if not isinstance(method, BlockMethod)]


def _courses(model: Model, stages: Sequence[Steps]) -> dict[str, tuple[Chain, ...]]:
    """Each slot's methods by stage; of block methods all those that might work on it."""

    def chain(steps: Steps, name: str, slot: Slot) -> Iterator[Method | BlockMethod]:
        for step in steps:
            if isinstance(step, BlockMethod):
                if name.startswith(f"{model.family.blocks}.") and not slot.protected:
                    yield step
            elif isinstance(step, Assignment) and name in step.methods:
                yield step.methods[name]

    return {name: tuple(tuple(chain(steps, name, slot)) for steps in stages) for name, slot in model.slots().items()}


def _check_rescalings(model: Model, stages: Sequence[Steps]) -> None:
    """Refuse to rescale what is compressed by then, or a model in which nothing can be rescaled."""
    rescaled = {model.prefix(block) + name for block in range(model.num_blocks) for name in touched(model)}
    compressed, turned = set(model.described), set[str]()
    for step in (step for steps in stages for step in steps):
        if isinstance(step, EdgeScaling):
            check_whole(model, name_of(step))
            check_foldable(model, step)
            for name in sorted(rescaled & turned):
                raise ValueError(f"{name} is rotated while the model runs and cannot be rescaled; set online: false")
            for name in sorted(rescaled & compressed):
                raise ValueError(f"{name}: only dense weights can be rescaled; put the rescaling step first")
        elif isinstance(step, Rotation):
            roles = online_roles(model, step)
            turned |= {name for name, slot in model.slots().items() if slot.role in roles}
        elif isinstance(step, Assignment):
            compressed |= step.methods.keys()
        else:
            compressed |= rescaled


def held_weight(model: Model, name: str) -> Weight | None:
    """What an earlier run of decoct made of a slot, without its values; None for an uncompressed one."""
    if name not in model.described:
        return None
    description = model.described[name]
    empty = {
        part: torch.empty(shape, dtype=dtype, device="meta")
        for part, (dtype, shape) in tensor_specs(description).items()
    }
    return rebuild(description, empty, name)


def left_dense(model: Model, name: str) -> bool:
    """Whether an earlier stage left a slot dense: as it was, or the corner of what it was."""
    held = model.described.get(name)
    return held is None or (held["kind"] == Padded.kind and held["inner"]["kind"] == Dense.kind)


def compressible_shape(model: Model, name: str) -> Shape:
    """What methods find of a slot: the matrix, or the corner that is left of it."""
    held = model.described.get(name)
    out, cols = model.shape(name) if held is None or held["kind"] != Padded.kind else held["inner"]["shape"]
    return int(out), int(cols)


def _structure(weight: Weight) -> str:
    """The kinds of a weight and all nested ones."""
    return f"{weight.kind}({','.join(_structure(child) for child in weight.children().values())})"


def _kept(verdicts: tuple[_Verdict, ...]) -> Chain:
    return tuple(verdict.method for verdict in verdicts if verdict.obstacle is None)


def _check_order(model: Model, name: str, course: tuple[Chain, ...]) -> None:
    for chain in course:
        if name == model.family.embed and any(method.stat is not None for method in chain):
            both = ", and lm_head is tied to it" if model.tied else ""
            raise ValueError(
                f"{name}: an embedding has no input statistics{both}; use a method without data, such as rtn"
            )
        slot = model.slots()[name]
        if any(isinstance(m.stat, ByGroup) for m in chain) and (slot.expert is not None or slot.protected):
            raise ValueError(
                f"{name}: guided weighs what layers inside the blocks put out, not experts, routers or lm_head; "
                f"give {slot.role} a rule of its own without it"
            )
        if any(reads_pairs(m) for m in chain) and slot.expert is not None:
            raise ValueError(f"{name}: the two models may route a token differently; give experts another method")
        if chain and isinstance(chain[0], LinearCorrection):
            raise ValueError(f"{name}: a correction needs an earlier step that compresses, in the same stage")


def _check_inputs(model: Model, name: str) -> None:
    """Inputs are rounded where a matrix has a linear layer of its own, inside the blocks."""
    slot = model.slots()[name]
    if slot.param is not None:
        raise ValueError(
            f"{name}: fused experts read their inputs as they are; "
            f"begin that step with {{match: {slot.role.split('.')[0]}.*, leave: true}}"
        )
    if slot.protected:
        raise ValueError(f"{name}: {slot.role} reads its inputs as they are; give it a method for weights only")


def _check_shapes(model: Model, name: str, verdicts: Sequence[_Verdict], courses: dict[str, tuple[Chain, ...]]) -> None:
    try:
        shape = compressible_shape(model, name)
        _check_leaves(verdicts, shape)
        for verdict in verdicts:
            if isinstance(verdict.method, BlockMethod) and verdict.obstacle is None:
                verdict.method.check_learned(shape)
    except GroupSizeError as error:
        alike = [compressible_shape(model, other)[1] for other, same in courses.items() if same == courses[name]]
        raise ValueError(f"{name}: {GroupSizeError(error.group_size, error.in_features, alike)}") from error
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _check_leaves(verdicts: Sequence[_Verdict], shape: Shape) -> None:
    """Whether methods fit a matrix of this shape and what the ones before them leave of it."""
    leaves = [shape]
    for verdict in verdicts:
        if not verdict.reshapes:
            continue
        for leaf in leaves:
            verdict.method.check(leaf)
        leaves = [found for leaf in leaves for found in verdict.method.leaves(leaf)]


def _check_used(found: dict[str, _Verdicts], num_stages: int) -> None:
    """Refuse a block method that would leave every matrix alone, with the reason that most of them have."""
    for number in range(num_stages):
        obstacles: dict[BlockMethod, list[str | None]] = {}
        for verdicts in found.values():
            for verdict in verdicts[number]:
                if isinstance(verdict.method, BlockMethod):
                    obstacles.setdefault(verdict.method, []).append(verdict.obstacle)
        for reasons in obstacles.values():
            if None not in reasons:
                raise ValueError(Counter(reasons).most_common(1)[0][0])


def _try(course: tuple[Chain, ...], start: _Start, name: str) -> tuple[_Verdicts, Made]:
    """Run a slot's methods on matrices of three shapes, as small as their settings allow."""
    misfit: ValueError | None = None
    for unit in _WIDTHS:
        shapes = (unit, unit), (2 * unit, unit), (unit, 2 * unit)
        try:
            done = [_try_once(course, shape, start, name) for shape in shapes]
        except _MisfitError as error:
            misfit = error
            continue
        terms = torch.tensor([[out * cols, out, cols] for out, cols in shapes], dtype=torch.float64)
        counts = torch.tensor([_counts(made) for _, made in done], dtype=torch.float64)
        nbytes, reals, unpacked = (Sizes(*found) for found in torch.linalg.solve(terms, counts).T.tolist())
        forms = tuple((shape, describe(made)) for shape, (_, made) in zip(shapes, done, strict=True))
        return done[0][0], Made(nbytes, reals, unpacked, done[0][1].quantizes_inputs, forms)
    raise ValueError(f"{name}: these settings fit no matrix up to {_WIDTHS[-1]} wide: {misfit}")


def _counts(made: Weight) -> list[int]:
    """What is counted of a weight, in the order of `Made`."""
    trained = for_training(made)
    reals = sum(tensor.numel() for tensor in trainable(trained).values())
    return [made.nbytes, reals, trained.nbytes - made.nbytes]


def _try_once(course: tuple[Chain, ...], shape: Shape, start: _Start, name: str) -> tuple[_Verdicts, Weight]:
    """What each method does, and the weight that comes of it."""
    _check_fit([_Verdict(method) for chain in course for method in linear(chain)], shape)
    generator = torch.Generator().manual_seed(0)
    first, held = start.of_shape(shape, generator), start.held
    inputs = torch.randn(2 * first.shape[1], first.shape[1], generator=generator)
    weight = first
    done: list[_Verdict] = []
    stages: list[tuple[_Verdict, ...]] = []
    for chain in course:
        begun, original = weight, _or_held(weight, first, held)
        so_far = len(done)
        for method in chain:
            if isinstance(method, BlockMethod):
                now = _or_held(weight, first, held)
                verdict = _Verdict(method, method.obstacle(now, original), reshapes=method.rounds(now))
                _check_fit([*done, verdict], shape)
                weight = method.begin(weight) if verdict.obstacle is None else weight
            else:
                verdict = _Verdict(method)
                weight = apply_method(method, weight, _statistic(method, inputs), begun, name)
            done.append(verdict)
        stages.append(tuple(done[so_far:]))
    return tuple(stages), weight


def _or_held(weight: Weight, first: Weight, held: Weight | None) -> Weight:
    """What a slot is by now: what it was before the recipe, until a method has changed it."""
    return held if held is not None and weight is first else weight


def _check_fit(verdicts: Sequence[_Verdict], shape: Shape) -> None:
    try:
        _check_leaves(verdicts, shape)
    except ValueError as error:
        raise _MisfitError(str(error)) from error


def _statistic(method: Method, inputs: torch.Tensor) -> object:
    if method.stat is None:
        return None
    stat = method.stat.empty(inputs.shape[1])
    stat.add(inputs)
    return stat

"""What narrowing a model will take, before anything runs."""

from dataclasses import replace
from math import prod

import torch

from decoct.engine.budget import Budget, product_rate
from decoct.engine.data import Data
from decoct.engine.guidance import Layout
from decoct.engine.narrow import NarrowModel, trunks
from decoct.engine.plan import Plan
from decoct.engine.plan_guidance import GuidancePlan
from decoct.engine.plan_reshaped import Costs, batch_bytes, computed_in, plan_reshaped
from decoct.engine.runner import running_nbytes
from decoct.engine.thin import ThinModel, hidden_step
from decoct.engine.uneven import UnevenModel
from decoct.losses.chunks import AT_ONCE
from decoct.losses.compiled import BYTES
from decoct.methods import name_of
from decoct.methods.prune.sheared_llama import ShearedLLaMA
from decoct.methods.width import WidthMethod
from decoct.model import Model

_NEAR = 0.01  # of the parameters: what is left is what was asked
_SQUARES = 5  # copies of an edge's Gram matrix while its matrices are refitted
_KEPT = 3  # of each input and output of a block's matrices, what the gradient wants kept
_COPIES = 4  # of an edge's matrices in float32


def plan_width(
    model: Model, method: WidthMethod, data: Data, budget: Budget, dtype: torch.dtype | None = None
) -> tuple[Plan, NarrowModel]:
    """Predict what narrowing takes, and what shapes are left.

    Args:
        model: what the stage begins with.
        method: settings.
        data: calibration.
        budget: limits.
        dtype: what to run blocks in; None: whatever this machine does fastest.

    Raises:
        ValueError: shapes that the architecture does not allow, a calibration that is too long, or too little memory.
    """
    left = narrowed(model, method)
    needs_data = method.needs_data
    dtype = computed_in(model, dtype, needs_data=needs_data)
    seconds = _seconds(model, method, data, dtype) if needs_data else 2 * model.nbytes / 1e9
    sweeps = method.by_gradient and not isinstance(method, ShearedLLaMA)
    scratch = _sweep(model).scratch_bytes(data, dtype, 0) if sweeps else 0
    working = max(_working(model, method, data, dtype), _finding(model, method, data, dtype))
    costs = Costs(working, seconds + _looking(model, method, data, dtype), max(scratch, _grams(model, method)))
    plan = plan_reshaped(left, method, costs, data if needs_data else None, budget, dtype)
    notes = (*_rounded_hidden(model, left, method), *_rounded(plan.share_left or 1.0, method))
    return replace(plan, notes=notes), left


def _rounded(left: float, method: WidthMethod) -> tuple[str, ...]:
    """Says so where whole steps of neurons take out more than was asked."""
    if method.keep == 1 or left > method.keep - _NEAR:
        return ()
    return (
        (
            f"{left:.0%} of the parameters are left, not {method.keep:.0%}: the number of neurons is rounded down to a "
            f"multiple of {method.multiple_of}; set {name_of(method)}.multiple_of to less"
        ),
    )


def narrowed(model: Model, method: WidthMethod) -> NarrowModel:
    """What a method makes of a model, uneven or not; of one that has lost its hidden channels already, the rest.

    Raises:
        ValueError: the model does not allow it.
    """
    if method.keep_hidden < 1 and not isinstance(model, ThinModel):
        model = ThinModel.of(model, method)
    return UnevenModel.of(model, method) if method.uneven else NarrowModel.of(model, method)


def _rounded_hidden(model: Model, left: NarrowModel, method: WidthMethod) -> tuple[str, ...]:
    """Says so where whole steps of hidden channels take out more than was asked."""
    full, width = model.shape(model.family.embed)[1], left.shape(model.family.embed)[1]
    if width == int(full * method.keep_hidden):
        return ()
    step = hidden_step(model, method)
    why = "set multiple_of to less" if method.multiple_of > 1 else "the architecture asks for that"
    return (
        (
            f"{width} of {full} hidden channels are left, {100 * width / full:.1f} % and not "
            f"{100 * method.keep_hidden:.1f} %: their number is rounded down to a multiple of {step}; {why}"
        ),
    )


def _finding(model: Model, method: WidthMethod, data: Data, dtype: torch.dtype) -> int:
    """All hidden states, a block that runs, and what is solved for one norm; 0: no channels are looked for."""
    if method.keep_hidden == 1:
        return 0
    table = prod(model.shape(model.family.embed))
    full = model.shape(model.family.embed)[1]
    states = data.num_tokens * full * dtype.itemsize
    batch = batch_bytes(model, data, torch.float32) + running_nbytes(model, dtype) + 4 * full**2 * _SQUARES
    return states + max(batch, 3 * 4 * table)


def _grams(model: Model, method: WidthMethod) -> int:
    """Bytes on disk of the second moments of what norms put out, where the matrices behind are refitted."""
    if method.keep_hidden == 1 or not method.reconstruct:
        return 0
    return 4 * model.shape(model.family.embed)[1] ** 2 * _norms(model)


def _looking(model: Model, method: WidthMethod, data: Data, dtype: torch.dtype) -> float:
    """Seconds of the run that finds hidden channels: the text once, second moments, a factorization for each norm."""
    if method.keep_hidden == 1:
        return 0.0
    full, grams = model.shape(model.family.embed)[1], 2.0 * data.num_tokens if method.reconstruct else 0.0
    solving = (grams + 4.0 * full) * full**2 * _norms(model) / (0.4 * product_rate(torch.float32))
    return solving + 2.0 * model.num_parameters * data.num_tokens / (0.4 * product_rate(dtype))


def _norms(model: Model) -> int:
    """How many read the residual stream."""
    return model.num_blocks * len(set(model.family.stream(model.config).norms.values())) + 1


def _working(model: Model, method: WidthMethod, data: Data, dtype: torch.dtype) -> int:
    """A block before and after, statistics of its edges, and the largest edge while it is refitted."""
    size = running_nbytes(model, dtype) + prod(model.shape(model.family.embed)) * dtype.itemsize
    if not method.needs_data:
        return size
    most, grams = 0, 0
    for trunk in trunks(model, method):
        channels = trunk.unit * trunk.num_units
        grams += 4 * channels**2
        entries = sum(
            prod(model.shape(model.prefix(0) + slot.name)) for slot in (trunk.reader, *(w.slot for w in trunk.writers))
        )
        most = max(most, 4 * (_SQUARES * channels**2 + _COPIES * entries))
    scoring = 0
    if method.uneven:  # all hidden states, a block's statistics, and its matrices in float32
        states = data.num_tokens * model.shape(model.family.embed)[1] * dtype.itemsize
        scoring = states + grams + running_nbytes(model, torch.float32)
    working = size + batch_bytes(model, data, dtype) + max(grams + most, scoring)
    if isinstance(method, ShearedLLaMA):
        return max(working, _learning(model, method, data, dtype))
    return max(working, _sweep(model).working_bytes(data, dtype)) if method.by_gradient else working


def _learning(model: Model, method: ShearedLLaMA, data: Data, dtype: torch.dtype) -> int:
    """The whole model, hidden states before every block, one block with all that its gradient wants, and logits."""
    tokens, width = method.batch_size * data.sequence_length, model.shape(model.family.embed)[1]
    shapes = [model.shape(model.prefix(0) + slot.name) for slot in model.block_slots]
    states = (model.num_blocks + 6) * tokens * width * dtype.itemsize
    block = sum(_COPIES * prod(shape) + _KEPT * tokens * sum(shape) for shape in shapes) * dtype.itemsize
    logits = max(BYTES, _COPIES * 4) * min(AT_ONCE, tokens * model.shape(model.end_slots[-1].name)[0])
    return model.num_parameters * dtype.itemsize + states + block + logits


def _sweep(model: Model) -> GuidancePlan:
    """What gradients take: as token weights of guided statistics, of which there are none."""
    return GuidancePlan(model, Layout(({},) * model.num_blocks))


def _seconds(model: Model, method: WidthMethod, data: Data, dtype: torch.dtype) -> float:
    """Runs of the calibration text, the statistics, and a factorization or a few for each edge.

    There are two runs, and one more where blocks share neurons among them, or run again once their heads are gone.
    """
    thrice = method.uneven or len(trunks(model, method)) > 1
    forwards = (6.0 if thrice else 4.0) * model.num_parameters * data.num_tokens / (0.4 * product_rate(dtype))
    squares = sum((trunk.unit * trunk.num_units) ** 2 for trunk in trunks(model, method))
    cubes = sum((trunk.unit * trunk.num_units) ** 3 for trunk in trunks(model, method))
    solving = (2.0 * data.num_tokens * squares + 10.0 * cubes) * model.num_blocks / (0.4 * product_rate(torch.float32))
    if isinstance(method, ShearedLLaMA):
        seen = method.num_steps * method.batch_size * data.sequence_length
        return forwards + solving + 8.0 * model.num_parameters * seen / (0.4 * product_rate(dtype))
    return forwards + solving + (_sweep(model).seconds(data, dtype) if method.by_gradient else 0.0)

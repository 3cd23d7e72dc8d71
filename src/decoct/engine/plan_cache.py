"""What saving a key-value cache policy will take, and whether the model's attention suits it."""

from dataclasses import replace

import torch

from decoct.engine.budget import Budget, compute_dtype, format_size, product_rate, resident_bytes
from decoct.engine.data import Data, check_length, writing_bytes
from decoct.engine.guidance import Layout
from decoct.engine.plan import FIXED, MARGIN, Group, Plan
from decoct.engine.plan_guidance import GuidancePlan
from decoct.engine.runner import Runner, running_nbytes
from decoct.methods import CacheMethod, Place
from decoct.model import Model

_HIDDEN_STATES = 6  # of one batch inside a block: its parts that live at a time, roughly


def plan_cache(
    model: Model,
    method: CacheMethod,
    data: Data,
    budget: Budget,
    earlier: tuple[Plan, ...],
    dtype: torch.dtype | None = None,
) -> Plan:
    """Check that the policy fits every block's attention, and predict what writing the result takes.

    Args:
        model: what the recipe begins with.
        method: the policy.
        data: calibration, where the policy learns something.
        budget: limits.
        earlier: the recipe's stages before this one.
        dtype: what to run blocks in; None: whatever this machine does fastest.

    Raises:
        ValueError: heads that the policy cannot pack, a calibration that is too long, or too little memory.
    """
    channels = model.family.head_size(model.config)
    for block, attention in enumerate(Runner(model, torch.float32).attentions()):
        method.check(channels, Place(block, attention.sliding_window, attention.frequencies))
    if method.learns:
        _check_text(method, data, model)
    dtype = dtype or (compute_dtype(model.dtype) if method.learns else model.dtype)
    slopes = _slopes(model) if method.by_gradients else None
    working = _working(model, method, data, dtype)
    limit, peak = budget.host_limit(), int(MARGIN * (resident_bytes() + FIXED + working))
    if peak > limit:
        less = "num_sequences" if slopes is None else "sequence_length"
        raise ValueError(
            f"{model.source.label} needs about {format_size(peak)} of memory to save a cache policy, the budget allows "
            f"{format_size(limit)}; raise budget.host, or set data.{less} to less"
        )
    seconds = 2.0 * model.num_parameters * data.num_tokens / (0.5 * product_rate(dtype)) if method.learns else 0.0
    made = earlier[-1] if earlier else None
    plan = Plan(
        kind="cache",
        steps=(),
        groups=(Group("keys and values", model.num_blocks, 0, (method,)),),
        num_parameters=model.num_parameters,
        needs_data=method.learns,
        dtype=dtype,
        in_memory=True,
        peak_bytes=peak,
        limit_bytes=limit,
        output_bytes=model.nbytes,
        scratch_bytes=0 if slopes is None else slopes.scratch_bytes(data, dtype, 0),
        seconds=seconds if slopes is None else slopes.seconds(data, dtype),
    )
    return plan if made is None else replace(plan, output_bytes=made.output_bytes, reals=made.reals)


def _check_text(method: CacheMethod, data: Data, model: Model) -> None:
    """Refuse sequences that are too long for the model, or too short for the policy to learn anything from."""
    check_length(data, model)
    fewest = method.sinks + method.step
    if data.sequence_length < fewest:
        raise ValueError(
            f"sequences of {data.sequence_length} tokens fill no group of {method.step} that the policy could learn "
            f"from; set data.sequence_length={fewest} or more"
        )


def _working(model: Model, method: CacheMethod, data: Data, dtype: torch.dtype) -> int:
    """Memory above what is resident: a block and the embedding, hidden states, or what gradients take."""
    width = model.shape(model.family.embed)[1]
    working = running_nbytes(model, dtype) + model.shape(model.family.embed)[0] * width * dtype.itemsize
    if not method.learns:
        return working
    if method.by_gradients:
        working = max(working, _slopes(model).working_bytes(data, dtype))
    else:
        states = data.num_tokens * width * dtype.itemsize
        working += states + _HIDDEN_STATES * max(data.sequence_length, 2048) * width * dtype.itemsize
    return max(working, writing_bytes(data, model))


def _slopes(model: Model) -> GuidancePlan:
    """What gradients take: as token weights of guided statistics, of which there are none."""
    return GuidancePlan(model, Layout(({},) * model.num_blocks))

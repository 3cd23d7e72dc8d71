"""What a plan should tell beside its figures: a step that prepares for one that is not there, a result that grows."""

from dataclasses import replace

from decoct.engine.budget import format_size
from decoct.engine.plan import Plan
from decoct.engine.rules import Assignment, Resolved
from decoct.methods import BlockMethod, EdgeScaling, Rotation, name_of


def with_notes(plans: tuple[Plan, ...], nbytes: int) -> tuple[Plan, ...]:
    """The same plans; one whose rescaling or rotation nothing makes use of says so, and one whose result is larger.

    Args:
        plans: of a recipe's stages, in order.
        nbytes: of the model that the recipe begins with.
    """
    noted = [
        replace(plan, notes=(*plan.notes, *_unused(plan, plans[number + 1 :]))) for number, plan in enumerate(plans)
    ]
    if noted[-1].output_bytes > nbytes:
        larger = f"the result is larger ({format_size(noted[-1].output_bytes)}) than the model ({format_size(nbytes)})"
        noted[-1] = replace(noted[-1], notes=(*noted[-1].notes, larger))
    return tuple(noted)


def _unused(plan: Plan, later: tuple[Plan, ...]) -> tuple[str, ...]:
    """A line on the steps of a pass that change no output and make nothing smaller, if no step behind them does."""
    if any(each.kind == "cache" or any(map(_compresses, each.steps)) for each in later):
        return ()
    last = max((number for number, step in enumerate(plan.steps) if _compresses(step)), default=-1)
    return tuple(
        f"{name_of(step)} only {'rotates' if isinstance(step, Rotation) else 'rescales channels'}, and no step behind "
        "it compresses: nothing becomes smaller; add one, such as {linear: {gptq: {bits: 4, group_size: channel}}}"
        for step in plan.steps[last + 1 :]
        if isinstance(step, EdgeScaling | Rotation)
    )


def _compresses(step: Resolved) -> bool:
    return isinstance(step, BlockMethod) or (isinstance(step, Assignment) and bool(step.methods))

"""Folders of integers in groups: which matrices take them, and whether what was written is what we have."""

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from decoct.exporters.compare import shapes_check
from decoct.exporters.fused import check_fused
from decoct.exporters.integer_formats import IntegerFormat, holders
from decoct.exporters.integers import Integers, form_of, integers_of
from decoct.exporters.misfit import MisfitError
from decoct.exporters.report import Check
from decoct.exporters.vllm_rules import Stored
from decoct.model import Model
from decoct.store import FolderSource, open_source
from decoct.weights import QuantizedInput, Weight, described_kinds

_ROUNDED = 2.0**-10  # of a matrix: scales are rounded to 16 bits
_ROUNDED_ZEROS = 2.0**-5  # zero · scale in bfloat16: half of 2^-8 of what may be several times a usual weight
Read = Callable[[str], Tensor]


@dataclass(frozen=True, slots=True)
class Layout:
    """How one matrix is written.

    Attributes:
        bits: of a code.
        group_size: as the format has it, -1 for one scale a row.
        symmetric: whether the middle code stands for zero everywhere.
    """

    bits: int
    group_size: int
    symmetric: bool

    def columns(self, width: int) -> int:
        """Input features that share a scale in the file."""
        return width if self.group_size < 0 else self.group_size


Layouts = dict[str, Layout | None]


def choose_layouts(model: Model, into: IntegerFormat, *, fold: bool) -> Layouts:
    """Each slot's layout by full name; None: it is written uncompressed. Looks at descriptions alone.

    Args:
        model: what is to be written, or what a recipe is expected to make.
        into: the format.
        fold: write uncompressed what it cannot hold; leave out what it cannot say.

    Raises:
        MisfitError: a weight or a cache policy that it cannot express, matrices that engines fuse but that would be
            stored differently, or nothing that it can hold at all.
    """
    if model.cache is not None and not fold:
        (policy,) = model.cache["policy"]
        what = f"{into.title} cannot say that keys and values are kept by {policy}"
        raise MisfitError(what, "leave the cache stage out", "add --fold to leave that out")
    layouts = {name: _layout(model, name, into, fold=fold) for name in model.slots()}
    if not any(layouts.values()):
        what = f"{model.source.label} has no quantized weights that {into.title} can hold"
        raise MisfitError(what, "quantize to integers by groups (such as rtn or gptq)", "export it as dense instead")
    if into.fused:
        check_fused(model, layouts)
    return layouts


def _layout(model: Model, name: str, into: IntegerFormat, *, fold: bool) -> Layout | None:
    description = model.described.get(name)
    if description is None:
        return None
    rounds = QuantizedInput.kind in described_kinds(description)
    if rounds and not fold:
        what = f"{into.title} cannot say that the inputs of {name} are rounded"
        raise MisfitError(what, "leave the step inputs out", "add --fold to leave that out")
    description = without_inputs(description)
    found = _fit(model, name, description, into)
    if isinstance(found, Layout):
        return found
    if fold:
        return None
    reason, wanted = found
    wanted = f"{wanted}{_or_elsewhere(model, name, description, into)}"
    advice = f"{wanted}, or add --fold to write such weights uncompressed"
    raise MisfitError(f"{into.title} cannot hold {name}: it is {reason}", wanted, advice)


def without_inputs(description: dict[str, Any]) -> dict[str, Any]:
    """A description without the rounding of its inputs."""
    while description["kind"] == QuantizedInput.kind:
        description = description["inner"]
    return description


def _fit(model: Model, name: str, description: dict[str, Any], into: IntegerFormat) -> Layout | tuple[str, str]:
    """The layout, or why there is none and what would have one."""
    slot, form = model.slots()[name], form_of(description)
    shape = (model.shape(name)[0], model.shape(name)[1])
    if form is None:
        kind = description["kind"]
        return f"a {kind} weight", "quantize to integers by groups or channels (such as rtn or gptq)"
    if slot.role in ("embed", "lm_head") and not into.ends:
        return f"a quantized {slot.role}, which its readers do not all load", f"leave {slot.role} uncompressed"
    if slot.transposed or slot.param is not None:
        return "a layer that is no plain Linear", f"leave {slot.role} uncompressed"
    misfit = into.misfit(form, shape)
    if misfit is not None:
        return misfit
    size = into.group_size(form, shape)
    assert size is not None
    return Layout(form.bits, size, form.zero == "middle" and not into.zeros_always)


def _or_elsewhere(model: Model, name: str, description: dict[str, Any], into: IntegerFormat) -> str:
    """The nearest other format that holds a weight as it is."""
    shape = (model.shape(name)[0], model.shape(name)[1])
    found = [each for each in holders(description, shape) if each != into.name]
    return f", export as {found[0]}, which holds it" if found else ", export as dense"


def notes_of(model: Model, layouts: Layouts) -> tuple[str, ...]:
    """What a user should know of how integers were laid out."""
    held = [name for name, layout in layouts.items() if layout is not None]
    left = [name for name in model.described if name in layouts and layouts[name] is None]
    said = f"{len(held)} of {len(layouts)} matrices hold decoct's own integers"
    notes = [said + (f", {len(left)} that were compressed are written uncompressed" if left else "")]
    smaller: Counter[tuple[int, int]] = Counter()
    for name in held:
        layout, form = layouts[name], form_of(without_inputs(model.described[name]))
        assert layout is not None
        assert form is not None
        size = layout.columns(model.shape(name)[1])
        smaller[form.group_size, size] += size != form.group_size
    notes += [f"groups of {old} are written as {new}, scales repeated ({n})" for (old, new), n in smaller.items() if n]
    return tuple(notes)


def in_float16(scale: Tensor, name: str) -> Tensor:
    """Scales in float16.

    Raises:
        ValueError: one is too large, or so small that it would be zero.
    """
    rounded = scale.to(torch.float16)
    if not bool(rounded.isfinite().all()) or bool(((rounded == 0) & (scale != 0)).any()):
        raise ValueError(f"{name} has scales that float16 cannot hold; export as compressed_tensors or gguf")
    return rounded


def uncompressed(model: Model, name: str) -> dict[str, Tensor]:
    """A matrix as it is, in the model's own dtype."""
    matrix = model.weight(name).unpack(model.dtype)
    return {name: matrix.T if model.slots()[name].transposed else matrix}


def grouped(weight: Weight, layout: Layout) -> Integers:
    """A weight's integers in the groups that are written."""
    while isinstance(weight, QuantizedInput):
        weight = weight.inner
    return integers_of(weight).regrouped(layout.columns(weight.shape[1]))


def stored_integers(model: Model, layouts: Layouts, words: tuple[str, ...]) -> list[Stored]:
    """What vLLM's rules go by, for every matrix in integers."""
    slots = model.slots()
    return [
        Stored(name, slots[name].role, model.shape(name), layout.bits, layout.group_size, layout.symmetric, words=words)  # type: ignore[arg-type]
        for name, layout in layouts.items()
        if layout is not None
    ]


Kind = tuple[tuple[int, ...], torch.dtype]
"""Shape and type of a tensor."""


class FolderPlan(Protocol):
    """A folder of integers before it is written."""

    @property
    def model(self) -> Model:
        """What is written."""

    @property
    def layouts(self) -> Layouts:
        """How, of each slot."""

    def kinds(self, name: str) -> dict[str, Kind]:
        """Shapes and types of the tensors of a matrix in integers."""

    def matrix(self, name: str, read: Read) -> Tensor:
        """A matrix as readers of the format unpack it, float32 [out, in]."""


def verify_folder(plan: FolderPlan, out: Path, rounded: Collection[str] = ()) -> list[Check]:
    """Whether a folder has the tensors that it should have, and our values in them.

    Args:
        plan: what was written.
        out: the folder.
        rounded: matrices whose zero points the format rounds: their error is told, and may be more than that of scales.
    """
    model, layouts = plan.model, plan.layouts
    source = open_source(out)
    assert isinstance(source, FolderSource)
    expected: dict[str, Kind] = {}
    for name, layout in layouts.items():
        if layout is None:
            shape = model.shape(name)
            stored = shape[::-1] if model.slots()[name].transposed else shape
            expected[name] = (stored, model.dtype)
        else:
            expected |= plan.kinds(name)
    for block in (None, *range(model.num_blocks)):
        expected |= {name: (model.shape(name), model.tensor(name).dtype) for name in model.others(block)}
    found = {name: (source.shape(name), source.dtype(name)) for name in source.names()}
    tensors = shapes_check("tensors", _flat(expected), _flat(found))
    if not tensors.ok:
        return [tensors]
    errors = {
        name: _error(model.weight(name).unpack(torch.float32), plan.matrix(name, source.read))
        for name, layout in layouts.items()
        if layout is not None
    }
    exact = {name: error for name, error in errors.items() if name not in rounded}
    checks = [tensors]
    if exact:
        checks.append(_check_errors("exact values", exact, _ROUNDED))
    if len(exact) < len(errors):
        others = {name: error for name, error in errors.items() if name in rounded}
        checks.append(_check_errors("values with rounded zero points", others, _ROUNDED_ZEROS))
    return checks


def _error(ours: Tensor, theirs: Tensor) -> float:
    """Relative to the norm of ours."""
    return float((theirs - ours).norm() / ours.norm().clamp(min=torch.finfo(torch.float32).tiny))


def _check_errors(name: str, errors: dict[str, float], limit: float) -> Check:
    worst = max(errors, key=lambda each: errors[each])
    return Check(name, errors[worst] <= limit, f"largest relative error {errors[worst]:.1e} ({worst})")


def _flat(kinds: dict[str, Kind]) -> dict[str, tuple[object, ...]]:
    return {name: (*shape, str(dtype)) for name, (shape, dtype) in kinds.items()}

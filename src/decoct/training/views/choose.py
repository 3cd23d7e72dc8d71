"""Which view each of a model's tensors gets, given what a recipe trains."""

from dataclasses import dataclass, field
from typing import Any

from typing_extensions import override

from decoct.methods import LinearMethod
from decoct.methods.quantize.qat import QAT
from decoct.methods.training import TrainingMethod
from decoct.model import Model
from decoct.ops.grid import resolve_group_size
from decoct.training.views import AnyView
from decoct.training.views.adapter import qa_lora_view, with_lora
from decoct.training.views.latent import latent_view
from decoct.training.views.rounding import Rounding
from decoct.training.views.vector import Vector
from decoct.training.views.view import View
from decoct.weights import LowRank, Sum, Weight, describe


def is_end(model: Model, name: str) -> bool:
    """Whether a slot is the embedding or lm_head."""
    return name in {slot.name for slot in model.end_slots}


def views_of(model: Model, method: TrainingMethod) -> dict[str, AnyView]:
    """A view of every matrix, by full name; of those that are not trained, one without parameters."""
    found = {}
    for name, slot in model.slots().items():
        if changes_form(method) and not slot.protected:
            found[name] = other_view(model.weight(name), method, name)
        else:
            found[name] = _view(model.weight(name), method, end=is_end(model, name))
    return found


def _view(weight: Weight, method: TrainingMethod, *, end: bool) -> AnyView:
    """The view of a weight that keeps its form."""
    everything = method.trains("ends" if end else "matrices")
    inside = ("",) if everything else corrections(describe(weight)) if method.trains("corrections") else ()
    return view_of_some(weight, inside)


def view_of_some(weight: Weight, inside: tuple[str, ...]) -> AnyView:
    """The view in which those stored numbers are trained whose names begin with one of these."""
    if not weight.quantizes_inputs:
        return View(weight, chosen=lambda name: name.startswith(inside))
    return Rounding(
        weight,
        lambda part, path: View(part, chosen=lambda name: f"{path}.{name}".startswith(inside)),
        lambda name: name.startswith(inside),
    )


def corrections(description: dict[str, Any], path: str = "") -> tuple[str, ...]:
    """Paths, each with a dot behind it, of the low-rank terms that stand beside something else in a weight."""
    found: tuple[str, ...] = ()
    for key, value in description.items():
        nested: dict[str, Any] = {key: value}
        if isinstance(value, list):
            nested = {f"{key}.{i}": item for i, item in enumerate(value)}
        for name, inner in nested.items():
            if isinstance(inner, dict) and "kind" in inner:
                low = description["kind"] == Sum.kind and inner["kind"] == LowRank.kind
                found += (f"{path}{name}.",) if low else corrections(inner, f"{path}{name}.")
    return found


def changes_form(method: TrainingMethod) -> bool:
    """Whether the blocks' matrices are stored in another form afterwards."""
    return isinstance(method, QAT) or method.trains("lora") or method.trains("qa_lora")


def other_view(weight: Weight, method: TrainingMethod, name: str) -> AnyView:
    """The view of a weight that is stored in another form afterwards.

    Raises:
        ValueError: a group size that does not divide its columns.
    """
    if method.trains("lora"):
        return view_of_some(*with_lora(weight, method.rank, method.seed, name))

    def of(part: Weight, path: str) -> View:
        if isinstance(method, QAT):
            return latent_view(part, method)
        return qa_lora_view(part, method.rank, method.seed, f"{name}/{path}" if path else name)

    return Rounding(weight, of, lambda _: isinstance(method, QAT)) if weight.quantizes_inputs else of(weight, "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Becoming(LinearMethod):
    """What training begins with: weights in the form that they will have. For plans.

    Attributes:
        method: settings of the training.
    """

    method: TrainingMethod = field(hash=False)  # its settings may be mappings, which have no hash

    @override
    def compress(self, weight: Weight, stat: Any) -> Weight:
        return other_view(weight, self.method, "").weight()

    @override
    def check(self, shape: tuple[int, int]) -> None:
        """The group size must divide the input features."""
        if isinstance(self.method, QAT):
            resolve_group_size(self.method.group_size, shape[1])


def vectors_of(model: Model, method: TrainingMethod) -> dict[str, Vector]:
    """The norms and biases that are trained, by full name."""
    return {name: Vector(model.tensor(name)) for name in vector_names(model)} if method.trains("norms") else {}


def vector_names(model: Model) -> list[str]:
    """Names of a model's norms and biases, in and outside the blocks."""
    everywhere = (*range(model.num_blocks), None)
    return [name for block in everywhere for name in model.others(block) if len(model.shape(name)) == 1]

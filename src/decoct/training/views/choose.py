"""Which view each of a model's tensors gets, given what a recipe trains."""

from decoct.methods.training import TrainingMethod
from decoct.model import Model
from decoct.training.views.vector import Vector
from decoct.training.views.view import View


def is_end(model: Model, name: str) -> bool:
    """Whether a slot is the embedding or lm_head."""
    return name in {slot.name for slot in model.end_slots}


def views_of(model: Model, method: TrainingMethod) -> dict[str, View]:
    """A view of every matrix, by full name; of those that are not trained, one without parameters."""
    found = {}
    for name in model.slots():
        trained = method.trains("ends" if is_end(model, name) else "matrices")
        found[name] = View(model.weight(name), chosen=_everything if trained else _nothing)
    return found


def _everything(_: str) -> bool:
    return True


def _nothing(_: str) -> bool:
    return False


def vectors_of(model: Model, method: TrainingMethod) -> dict[str, Vector]:
    """The norms and biases that are trained, by full name."""
    return {name: Vector(model.tensor(name)) for name in vector_names(model)} if method.trains("norms") else {}


def vector_names(model: Model) -> list[str]:
    """Names of a model's norms and biases, in and outside the blocks."""
    everywhere = (*range(model.num_blocks), None)
    return [name for block in everywhere for name in model.others(block) if len(model.shape(name)) == 1]

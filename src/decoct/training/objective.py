"""What is lessened: one loss, or a weighted sum of some, as a recipe names them."""

import difflib
from dataclasses import MISSING, dataclass, fields
from typing import Any

from jaxtyping import Float
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from decoct.losses import LOSSES, Batch, PredictionLoss, Projected, Targets

WEIGHT = "weight"
"""Key of a loss's share in a sum, beside its own settings."""


@dataclass(frozen=True, slots=True)
class Objective:
    """A weighted sum of losses.

    Attributes:
        terms: what each weighs, and each.
    """

    terms: tuple[tuple[float, PredictionLoss], ...]

    @property
    def needs_teacher(self) -> bool:
        """Whether a teacher's predictions are wanted."""
        return any(loss.needs_teacher for _, loss in self.terms)

    def __call__(self, student: Projected, teacher: Targets | None, batch: Batch) -> Float[Tensor, ""]:
        """The sum; differentiable as its losses are."""
        found = [weight * loss(student, teacher if loss.needs_teacher else None, batch) for weight, loss in self.terms]
        return sum(found[1:], start=found[0])


def objective_of(stated: str | dict[str, Any]) -> Objective:
    """A recipe's `loss`: a name, or {name: {setting: value}, …}; of several, each may have a `weight`.

    Raises:
        ValueError: an unknown loss or setting, or a value that it does not take.
    """
    named = {stated: {}} if isinstance(stated, str) else stated
    if not named:
        raise ValueError("loss names nothing; write loss: forward_kl")
    return Objective(tuple(_term(name, {} if settings is None else settings) for name, settings in named.items()))


def _term(name: str, settings: Any) -> tuple[float, PredictionLoss]:
    if name not in LOSSES:
        raise ValueError(f"unknown loss {name!r}{_nearest(name, list(LOSSES))}")
    cls = LOSSES[name]
    if not issubclass(cls, PredictionLoss):
        raise ValueError(  # noqa: TRY004 - of what a user wrote
            f"{name} is no loss on predictions, which training goes by; take one such as forward_kl"
        )
    if not isinstance(settings, dict):
        raise ValueError(f"loss {name}: expected settings such as {{weight: 0.5}}, not {settings!r}")  # noqa: TRY004
    known = {field.name: field.type for field in fields(cls)}
    for key in settings:
        if key not in known and key != WEIGHT:
            raise ValueError(f"loss {name}: unknown key {key!r}{_nearest(key, [*known, WEIGHT])}")
    lacking = [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]
    absent = [key for key in lacking if key not in settings]
    if absent:
        raise ValueError(f"loss {name} needs {absent[0]}")
    given = {key: value for key, value in settings.items() if key != WEIGHT}
    try:
        weight = TypeAdapter(float).validate_python(settings.get(WEIGHT, 1.0))
        loss: PredictionLoss = TypeAdapter(cls).validate_python(given)
    except ValidationError as error:
        first = error.errors()[0]
        reason = first["msg"].removeprefix("Value error, ")
        raise ValueError(f"loss {name}: {reason}") from None
    return weight, loss


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"

"""What is lessened: one loss, or a weighted sum of some, as a recipe names them."""

import difflib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

import torch
from jaxtyping import Float
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from decoct.losses import LOSSES, AnyLoss, Batch, Exits, PredictionLoss, Projected, StateLoss, Targets

WEIGHT = "weight"
"""Key of a loss's share in a sum, beside its own settings."""


@dataclass(frozen=True, slots=True)
class Objective:
    """A weighted sum of losses.

    Attributes:
        terms: on predictions: what each weighs, and each.
        exits: on predictions behind several blocks.
        inner: on what is inside the blocks.
    """

    terms: tuple[tuple[float, PredictionLoss], ...]
    exits: tuple[tuple[float, Exits], ...] = ()
    inner: tuple[tuple[float, StateLoss], ...] = ()

    @property
    def predicting(self) -> tuple[PredictionLoss, ...]:
        """Every loss on predictions, those at exits too."""
        return (*(loss for _, loss in self.terms), *(loss.each for _, loss in self.exits))

    @property
    def needs_teacher(self) -> bool:
        """Whether a teacher is wanted."""
        return bool(self.inner) or any(loss.needs_teacher for loss in self.predicting)

    def exit_blocks(self, num_blocks: int) -> list[int]:
        """Numbers of the blocks behind which predictions are wanted, the last among them; none without exits."""
        return sorted({block for _, loss in self.exits for block in loss.blocks(num_blocks)})

    def __call__(
        self,
        student: Projected,
        teacher: Targets | None,
        batch: Batch,
        exits: Mapping[int, Projected] | None = None,
    ) -> Float[Tensor, ""]:
        """The sum of all but inner losses; differentiable as these are.

        Args:
            student: its predictions.
            teacher: its predictions; None where no loss wants any.
            batch: labels and weights.
            exits: the student's predictions behind each of `exit_blocks`, by number.
        """
        found = [weight * loss(student, teacher if loss.needs_teacher else None, batch) for weight, loss in self.terms]
        for weight, several in self.exits:
            assert exits is not None
            depths = {block: exits[block] for block in several.blocks(max(exits) + 1)}
            found.append(weight * several(depths, teacher if several.each.needs_teacher else None, batch))
        return sum(found, start=torch.zeros(()))


def objective_of(stated: str | dict[str, Any]) -> Objective:
    """A recipe's `loss`: a name, or {name: {setting: value}, …}; of several, each may have a `weight`.

    Raises:
        ValueError: an unknown loss or setting, or a value that it does not take.
    """
    named = {stated: {}} if isinstance(stated, str) else stated
    if not named:
        raise ValueError("loss names nothing; write loss: forward_kl")
    found = [_term(name, {} if settings is None else settings) for name, settings in named.items()]
    return Objective(
        tuple((weight, loss) for weight, loss in found if isinstance(loss, PredictionLoss)),
        tuple((weight, loss) for weight, loss in found if isinstance(loss, Exits)),
        tuple((weight, loss) for weight, loss in found if isinstance(loss, StateLoss)),
    )


def _term(name: str, settings: Any) -> tuple[float, AnyLoss]:
    if name not in LOSSES:
        raise ValueError(f"unknown loss {name!r}{_nearest(name, list(LOSSES))}")
    cls = LOSSES[name]
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
    if cls is Exits and "each" in given:
        given["each"] = _each(given["each"])
    try:
        weight = TypeAdapter(float).validate_python(settings.get(WEIGHT, 1.0))
        loss: AnyLoss = TypeAdapter(cls).validate_python(given)
    except ValidationError as error:
        first = error.errors()[0]
        reason = first["msg"].removeprefix("Value error, ")
        raise ValueError(f"loss {name}: {reason}") from None
    return weight, loss


def _each(stated: Any) -> PredictionLoss:
    """The loss at every exit."""
    found = objective_of(stated).terms if isinstance(stated, str | dict) else ()
    if len(found) != 1:
        raise ValueError(f"loss exits: each is one loss on predictions, such as forward_kl, not {stated!r}")
    return found[0][1]


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"

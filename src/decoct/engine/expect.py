"""What a recipe will have made of a model once it has run: the form of every weight, known while planning.

The rehearsal makes weights of three small shapes. In their descriptions only whole numbers depend on the shape (rows,
groups, bytes of codes), and grow with it in proportion; so three shapes tell what they are in any other.
"""

from collections.abc import Sequence
from typing import Any

from decoct.engine.rehearse import Made, Rehearsal, Shape
from decoct.model import Model
from decoct.weights import Dense

Described = dict[str, dict[str, Any]]
"""Descriptions of all weights that are not dense, by full name."""


def expected_weights(model: Model, rehearsal: Rehearsal) -> Described | None:
    """The descriptions that a model's weights will have.

    Args:
        model: what the recipe begins with, in the basis that its stages set.
        rehearsal: of all its passes.

    Returns:
        None where that shows only in the run: something that an earlier run compressed is compressed further, and the
        rehearsal begins with dense matrices.
    """
    found: Described = {}
    for name in model.slots():
        made = rehearsal.made(name)
        if name in model.described:
            if made is not None:
                return None
            found[name] = model.described[name]
        else:
            description = at_shape(rehearsal.sizes[name], model.shape(name))
            if description["kind"] != Dense.kind:
                found[name] = description
    return found


def at_shape(made: Made, shape: tuple[int, ...]) -> dict[str, Any]:
    """The description of what a slot's methods make of a matrix of this shape.

    Bits, kinds, numbers of rows and of groups are exact; bytes are those of rows that are filled to their last bit.
    """
    found = _between(made.forms, shape)
    assert isinstance(found, dict)
    return found


def _between(forms: Sequence[tuple[Shape, Any]], shape: tuple[int, ...]) -> object:
    """One value of a description, given what it is at (n, n), (2n, n) and (n, 2n)."""
    (((out, cols), square), (_, tall), (_, wide)) = forms
    match square, tall, wide:
        case bool(), _, _:
            return square
        case int(), int(), int():
            return round(square + (tall - square) * (shape[0] / out - 1) + (wide - square) * (shape[1] / cols - 1))
        case dict(), dict(), dict():
            alike = square.keys() & tall.keys() & wide.keys()
            return {key: _between([(at, form[key]) for at, form in forms], shape) for key in square if key in alike}
        case list(), list(), list() if len(square) == len(tall) == len(wide):
            return [_between([(at, form[i]) for at, form in forms], shape) for i in range(len(square))]
    return square

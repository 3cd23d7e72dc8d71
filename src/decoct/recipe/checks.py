"""Keys, types and ranges of what a recipe says; each refusal names the place. All of them raise `RecipeError`."""

import difflib
from typing import Any, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

_Settings = TypeVar("_Settings", bound=BaseModel)


class RecipeError(ValueError):
    """A recipe or setting that says something impossible: wrong use, not a failure."""


def strings(value: Any, where: str) -> tuple[str, ...]:
    """One text or a list of them."""
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not all(isinstance(item, str) for item in found):
        raise RecipeError(f"{where}: expected a text or a list of texts, not {value!r}")
    return tuple(found)


def single(value: Any, where: str) -> tuple[str, Any]:
    """The key and value of a mapping that must have exactly one."""
    if not isinstance(value, dict) or len(value) != 1:
        raise RecipeError(f"{where} must have exactly one key, not {value!r}")
    return next((str(key), inner) for key, inner in value.items())


def settings_of(cls: type[_Settings], value: Any, where: str) -> _Settings:
    """One of a recipe's own groups of settings: `data`, `budget`, `search`."""
    value = {} if value is None else value
    if not isinstance(value, dict):
        raise RecipeError(f"{where}: expected settings, not {value!r}")
    check_keys(value, list(cls.model_fields), where)
    for key, each in value.items():
        _check_no_switch(each, f"{where}.{key}")
    try:
        return cls(**value)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join([where, *(str(part) for part in first["loc"])])
        raise RecipeError(f"{place}: {first['msg'].removeprefix('Value error, ')}") from None


def typed(hint: Any, value: Any, where: str) -> Any:
    """A value of the type that a setting has; a switch is no number, a text neither, and lists become tuples."""
    try:
        return TypeAdapter(hint).validate_python(tuple(value) if isinstance(value, list) else value, strict=True)
    except ValidationError as error:
        raise RecipeError(f"{where}: {error.errors()[0]['msg']} (got {value!r})") from None


def share(value: Any, where: str) -> float:
    """A fraction of a whole."""
    found = typed(float, value, where)
    if not 0 <= found <= 1:
        raise RecipeError(f"{where} must be a fraction from 0 to 1, such as 0.1, not {value!r}")
    return float(found)


def check_keys(value: dict[str, Any], known: Any, where: str) -> None:
    """Refuse a key that is not known."""
    for key in value:
        if key not in known:
            raise RecipeError(f"{where}: unknown key {key!r}{nearest(str(key), known)}")


def nearest(name: str, known: Any) -> str:
    """The end of a message on an unknown name: the name it resembles most, or all there are."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)  # of names as short as w4
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


def _check_no_switch(value: Any, where: str) -> None:
    """None of a recipe's own settings is a switch, and Python would take one for the number 1 or 0."""
    for each in value if isinstance(value, list) else [value]:
        if isinstance(each, bool):
            raise RecipeError(f"{where}: expected a number or a text, not {str(each).lower()}")

"""Settings of a recipe changed from outside: `--set`, and the options that stand for it."""

from dataclasses import fields
from typing import Any

import yaml

from decoct.methods import METHODS
from decoct.methods.training import TrainingMethod
from decoct.recipe.checks import RecipeError, nearest

_TRAINING_METHODS = [name for name, cls in METHODS.items() if issubclass(cls, TrainingMethod)]


def with_settings(value: dict[str, Any], settings: list[str]) -> dict[str, Any]:
    """Apply `key=value` settings to a recipe: `data.…`, `budget.…`, `search.…`, or `METHOD.FIELD` wherever it stands.

    Raises:
        RecipeError: no `=`, or a key that names nothing in this recipe, or no group of settings.
    """
    changed: dict[str, Any] = yaml.safe_load(yaml.safe_dump(value))
    for setting in settings:
        key, equals, text = setting.partition("=")
        scope, _, name = key.strip().partition(".")
        scopes = [scope]
        if key.strip() in ("teacher", "minutes"):  # of whichever stages train
            scopes, name = _TRAINING_METHODS, key.strip()
        if not equals or not name:
            owners = [
                each for each in _methods_in(changed) if key.strip() in {field.name for field in fields(METHODS[each])}
            ]
            examples = [f"{each}.{setting}" for each in owners] or ["data.num_sequences=64", "gptq.bits=3"]
            raise RecipeError(f"--set {setting!r}: write it as {' or '.join(examples)}")
        try:
            new = yaml.safe_load(text)
        except yaml.YAMLError:
            raise RecipeError(f"--set {setting!r}: {text!r} is not a valid value") from None
        if scope in ("data", "budget", "search"):
            _put(changed, scope, name, new)
            continue
        found = [(each, scope) for scope in scopes for each in _method_settings(changed.get("stages"), scope)]
        if not found and scopes == _TRAINING_METHODS:
            option = "--minutes" if name == "minutes" else name
            raise RecipeError(f"nothing in this recipe trains ({', '.join(scopes)} do); leave {option} out")
        if not found:
            hint = nearest(scope, ("data", "budget", "search", *_methods_in(changed)))
            raise RecipeError(f"--set {setting!r}: this recipe has no {scope}{hint}")
        for holder, scope in found:
            _put(holder, scope, name, new)
    return changed


def _methods_in(recipe: dict[str, Any]) -> list[str]:
    """Names of the methods that a recipe uses."""
    return [name for name in METHODS if any(True for _ in _method_settings(recipe.get("stages"), name))]


def _put(holder: dict[str, Any], scope: str, name: str, value: Any) -> None:
    """Set one of a group of settings, which may not be there yet."""
    old = holder.get(scope)
    if not isinstance(old, dict | None):
        raise RecipeError(f"{scope}: expected settings, not {old!r}; give {scope} its keys before one is set")
    holder[scope] = {**(old or {}), name: value}


def _method_settings(value: Any, name: str) -> Any:
    if isinstance(value, dict):
        if name in value and name in METHODS:
            yield value
        for inner in value.values():
            yield from _method_settings(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from _method_settings(inner, name)

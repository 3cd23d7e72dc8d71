"""Recipes: YAML or Python data in, stages out. A method's fields are its keys; a wrong key names the nearest one."""

import difflib
from dataclasses import MISSING, asdict, dataclass, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from decoct.engine.budget import Budget
from decoct.engine.data import Data
from decoct.engine.plan import StepRules
from decoct.engine.rules import Rule
from decoct.engine.stages import (
    BlocksStage,
    CacheStage,
    DepthStage,
    ExpertStage,
    ModelStage,
    SliceStage,
    Stage,
    WidthStage,
)
from decoct.methods import (
    METHODS,
    AnyMethod,
    BlockStep,
    CacheMethod,
    Guided,
    LinearMethod,
    ModelMethod,
    name_of,
)
from decoct.methods.depth import DepthMethod
from decoct.methods.experts import ExpertMethod
from decoct.methods.prune.slicegpt import SliceGPT
from decoct.methods.quantize.e2e_qp import E2EQP
from decoct.methods.training import TrainingMethod
from decoct.methods.width import WidthMethod
from decoct.search.settings import Search
from decoct.training.stages import own_stage

_Settings = TypeVar("_Settings", bound=BaseModel)
_RULE_KEYS = ("match", "min_share", "leave")
_BLOCK_METHODS = [name for name, cls in METHODS.items() if issubclass(cls, BlockStep)]
_MODEL_METHODS = [name for name, cls in METHODS.items() if issubclass(cls, ModelMethod)]
_TRAINING_METHODS = [name for name, cls in METHODS.items() if issubclass(cls, TrainingMethod)]
_CACHE_METHODS = [name for name, cls in METHODS.items() if issubclass(cls, CacheMethod)]
_TOP_KEYS = ("name", "about", "data", "budget", "search", "stages", "export")


class RecipeError(ValueError):
    """A recipe or setting that says something impossible: wrong use, not a failure."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """A recipe, checked.

    Attributes:
        stages: what to do, in order.
        data: calibration.
        budget: limits.
        export: formats to write beside the result.
        search: how to choose the bits of its quantizer first; None: as the recipe has them.
    """

    stages: tuple[Stage, ...]
    data: Data
    budget: Budget
    export: tuple[str, ...] = ()
    search: Search | None = None


def presets() -> dict[str, str]:
    """Names of the recipes that come with decoct, and what each is for."""
    folder = resources.files("decoct") / "recipes"
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".yaml")), key=lambda f: f.name)
    return {f.name.removesuffix(".yaml"): str(yaml.safe_load(f.read_text(encoding="utf-8"))["about"]) for f in files}


def read_recipe(source: str | Path) -> dict[str, Any]:
    """A preset by name, whatever lies in the current folder, or a recipe file, as plain data.

    Raises:
        RecipeError: there is no such file or preset, or it is not YAML.
    """
    path = Path(source)
    preset = resources.files("decoct") / "recipes" / f"{path.name}.yaml"
    if str(source) == path.name and preset.is_file():
        text = preset.read_text(encoding="utf-8")
    elif path.suffix in (".yaml", ".yml") or path.exists():
        if not path.exists():
            raise RecipeError(f"recipe {path} does not exist")
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError) as error:
            raise RecipeError(f"{path} cannot be read as a recipe ({error})") from None
    else:
        raise RecipeError(f"no preset or recipe file {str(source)!r}{_nearest(str(source), presets())}")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(value, dict):
        raise RecipeError(f"{source} is no recipe: it must be a mapping with the key stages")
    return value


def parse_recipe(value: dict[str, Any]) -> Recipe:
    """Check a recipe given as plain data.

    Raises:
        RecipeError: an unknown key (the nearest right one is named), a value of the wrong type or out of range.
    """
    _check_keys(value, _TOP_KEYS, "recipe")
    stages = value.get("stages")
    if not isinstance(stages, list) or not stages:
        raise RecipeError("a recipe needs stages: a list such as [{blocks: [{linear: {gptq: {bits: 4}}}]}]")
    export = value.get("export") or []
    return Recipe(
        stages=tuple(_stage(stage, f"stages[{i}]") for i, stage in enumerate(stages)),
        data=_settings(Data, value.get("data"), "data"),
        budget=_settings(Budget, value.get("budget"), "budget"),
        export=_strings(export, "export"),
        search=None if value.get("search") is None else _settings(Search, value["search"], "search"),
    )


def with_settings(value: dict[str, Any], settings: list[str]) -> dict[str, Any]:
    """Apply `key=value` settings to a recipe: `data.…`, `budget.…`, `search.…`, or `METHOD.FIELD` wherever it stands.

    Raises:
        RecipeError: no `=`, or a key that names nothing in this recipe.
    """
    changed: dict[str, Any] = yaml.safe_load(yaml.safe_dump(value))
    for setting in settings:
        key, equals, text = setting.partition("=")
        scope, _, name = key.strip().partition(".")
        scopes = [scope]
        if key.strip() in ("teacher", "minutes"):  # of whichever stages train
            scopes, name = _TRAINING_METHODS, key.strip()
        if not equals or not name:
            raise RecipeError(f"--set {setting!r}: write it as data.num_sequences=64 or gptq.bits=3")
        try:
            new = yaml.safe_load(text)
        except yaml.YAMLError:
            raise RecipeError(f"--set {setting!r}: {text!r} is not a valid value") from None
        if scope in ("data", "budget", "search"):
            changed.setdefault(scope, {})
            changed[scope] = {**(changed[scope] or {}), name: new}
            continue
        found = [(each, scope) for scope in scopes for each in _method_settings(changed.get("stages"), scope)]
        if not found:
            mine = [name for name in METHODS if any(True for _ in _method_settings(changed.get("stages"), name))]
            hint = _nearest(scope, ("data", "budget", "search", *mine))
            raise RecipeError(f"--set {setting!r}: this recipe has no {scope}{hint}")
        for holder, scope in found:
            holder[scope] = {**(holder[scope] or {}), name: new}
    return changed


def with_rules(recipe: Recipe, stage: int, step: int, rules: tuple[Rule, ...]) -> Recipe:
    """The same recipe with other rules in one of its steps, and nothing left to search.

    Args:
        recipe: whose stage of this number streams the blocks.
        stage: its number.
        step: the step's number in it.
        rules: in order.
    """
    old = recipe.stages[stage]
    assert isinstance(old, BlocksStage)
    steps = (*old.steps[:step], rules, *old.steps[step + 1 :])
    new = BlocksStage(steps, {"blocks": [_step_settings(each) for each in steps]})
    return replace(recipe, stages=(*recipe.stages[:stage], new, *recipe.stages[stage + 1 :]), search=None)


def recipe_text(recipe: Recipe, about: str) -> str:
    """A recipe as YAML that `read_recipe` reads back, every setting stated.

    Args:
        recipe: to write.
        about: one sentence for people.
    """
    budget = {key: value for key, value in recipe.budget.model_dump(mode="json").items() if value is not None}
    value: dict[str, Any] = {"about": about, "data": recipe.data.model_dump(mode="json")}
    value |= {"budget": budget} if budget else {}
    value["stages"] = [stage.description for stage in recipe.stages]
    value |= {"search": recipe.search.model_dump(mode="json")} if recipe.search is not None else {}
    value |= {"export": list(recipe.export)} if recipe.export else {}
    return yaml.safe_dump(value, sort_keys=False, default_flow_style=None, width=118, allow_unicode=True)


def method_settings(method: AnyMethod) -> dict[str, Any]:
    """A method as a recipe spells it: `{"gptq": {"bits": 4, …}}`."""
    if isinstance(method, Guided):
        ((name, settings),) = method_settings(method.method).items()
        return {name: {**settings, "guided": method.groups}}
    name = name_of(method)
    return {name: asdict(method)}


def build_method(name: str, value: Any, where: str) -> AnyMethod:
    """One method from its name and fields.

    Raises:
        RecipeError: as for `parse_recipe`.
    """
    cls = METHODS.get(name)
    if cls is None:
        raise RecipeError(f"{where}: unknown method {name!r}{_nearest(name, METHODS)}")
    value = {} if value is None else value
    if not isinstance(value, dict):
        raise RecipeError(f"{where}.{name}: expected settings such as {{bits: 4}}, not {value!r}")
    known = [field.name for field in fields(cls)]
    _check_keys(value, known, f"{where}.{name}")
    hints = get_type_hints(cls)
    checked: dict[str, Any] = {}
    for field in fields(cls):
        if field.name in value:
            checked[field.name] = _typed(hints[field.name], value[field.name], f"{where}.{name}.{field.name}")
        elif field.default is MISSING and field.default_factory is MISSING:
            raise RecipeError(f"{where}.{name} needs {field.name}")
    try:
        return cls(**checked)
    except ValueError as error:
        raise RecipeError(f"{where}.{name}: {error}") from None


def _stage(value: Any, where: str) -> Stage:
    kind, inner = _single(value, where)
    if kind in _MODEL_METHODS:
        return _model_stage(build_method(kind, inner, where))
    if kind == "cache":
        name, settings = _single(inner, f"{where}.cache")
        if name not in _CACHE_METHODS:
            raise RecipeError(
                f"{where}.cache: {name!r} is no policy for keys and values{_nearest(name, _CACHE_METHODS)}"
            )
        policy = build_method(name, settings, f"{where}.cache")
        assert isinstance(policy, CacheMethod)
        return CacheStage(policy, {"cache": method_settings(policy)})
    if kind != "blocks":
        if kind in _CACHE_METHODS:
            raise RecipeError(f"{where}: {kind} is a policy for keys and values; write {{cache: {{{kind}: …}}}}")
        if kind in METHODS:
            step = f"{{{kind}: …}}" if kind in _BLOCK_METHODS else f"{{linear: {{{kind}: …}}}}"
            raise RecipeError(f"{where}: {kind} works inside a streamed pass; write {{blocks: [{step}]}}")
        raise RecipeError(f"{where}: unknown stage {kind!r}{_nearest(kind, ['blocks', 'cache', *_MODEL_METHODS])}")
    if not isinstance(inner, list) or not inner:
        raise RecipeError(f"{where}.blocks must be a list of steps, such as [{{linear: {{gptq: {{bits: 4}}}}}}]")
    steps = tuple(_step(step, f"{where}.blocks[{i}]") for i, step in enumerate(inner))
    return BlocksStage(steps, {"blocks": [_step_settings(step) for step in steps]})


def _model_stage(method: AnyMethod) -> Stage:
    """The stage of a method on the whole model."""
    settings = method_settings(method)
    match method:
        case DepthMethod():
            return DepthStage(method, settings)
        case WidthMethod():
            return WidthStage(method, settings)
        case SliceGPT():
            return SliceStage(method, settings)
        case ExpertMethod():
            return ExpertStage(method, settings)
        case E2EQP():
            return ModelStage(method, settings)
    own = own_stage(method, settings)
    assert own is not None
    return own


def _step(value: Any, where: str) -> StepRules:
    kind, inner = _single(value, where)
    if kind != "linear":
        if kind not in METHODS:
            raise RecipeError(f"{where}: unknown step {kind!r}{_nearest(kind, ['linear', *_BLOCK_METHODS])}")
        method = build_method(kind, inner, where)
        if isinstance(method, ModelMethod | CacheMethod):
            raise _no_step(method, kind, where)
        if not isinstance(method, BlockStep):
            raise RecipeError(f"{where}: {kind} works on single matrices; write {{linear: {{{kind}: …}}}}")
        return method
    rules = inner if isinstance(inner, list) else [inner]
    return tuple(_rule(rule, f"{where}.linear[{i}]") for i, rule in enumerate(rules))


def _rule(value: Any, where: str) -> Rule:
    if not isinstance(value, dict):
        raise RecipeError(f"{where}: expected a rule such as {{match: mlp.down, gptq: {{bits: 6}}}}, not {value!r}")
    names = [key for key in value if key not in _RULE_KEYS]
    for name in names:
        if name not in METHODS:
            raise RecipeError(f"{where}: unknown key {name!r}{_nearest(name, [*METHODS, *_RULE_KEYS])}")
    leave = bool(value.get("leave", False))
    if len(names) != (0 if leave else 1):
        raise RecipeError(f"{where}: give exactly one method, or leave: true (found {', '.join(names) or 'none'})")
    match = value.get("match", "*")
    patterns = _strings(match, f"{where}.match")
    share = _typed(float, value.get("min_share", 0.0), f"{where}.min_share")
    method = None if leave else _guided(names[0], value[names[0]], where)
    if isinstance(method, BlockStep):
        raise RecipeError(f"{where}: {names[0]} works on whole blocks; write it as a step of its own, beside linear")
    if isinstance(method, ModelMethod | CacheMethod):
        raise _no_step(method, names[0], where)
    return Rule(patterns, method, share)


def _guided(name: str, value: Any, where: str) -> AnyMethod:
    """A method for single matrices; its settings may have `guided` beside its own keys."""
    if not isinstance(value, dict) or not value.get("guided"):
        own = {key: each for key, each in value.items() if key != "guided"} if isinstance(value, dict) else value
        return build_method(name, own, where)
    method = build_method(name, {key: each for key, each in value.items() if key != "guided"}, where)
    groups = _typed(int, value["guided"], f"{where}.{name}.guided")
    if not isinstance(method, LinearMethod):
        raise RecipeError(f"{where}.{name}: unknown key 'guided'; it is for methods that quantize a matrix")
    try:
        return Guided(method=method, groups=groups)
    except ValueError as error:
        raise RecipeError(f"{where}.{name}: {error}") from None


def _no_step(method: ModelMethod | CacheMethod, name: str, where: str) -> RecipeError:
    """Why a stage does not stand among steps."""
    if isinstance(method, CacheMethod):
        return RecipeError(f"{where}: {name} is a policy for keys and values; write the stage {{cache: {{{name}: …}}}}")
    return RecipeError(f"{where}: {name} works on the whole model; write it as a stage of its own")


def _step_settings(step: StepRules) -> dict[str, Any]:
    return {"linear": [_rule_settings(r) for r in step]} if isinstance(step, tuple) else method_settings(step)


def _rule_settings(rule: Rule) -> dict[str, Any]:
    share = {"min_share": rule.min_share} if rule.min_share else {}
    method = {"leave": True} if rule.method is None else method_settings(rule.method)
    return {"match": list(rule.match), **share, **method}


def _strings(value: Any, where: str) -> tuple[str, ...]:
    """One text or a list of them."""
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not all(isinstance(item, str) for item in found):
        raise RecipeError(f"{where}: expected a text or a list of texts, not {value!r}")
    return tuple(found)


def _single(value: Any, where: str) -> tuple[str, Any]:
    if not isinstance(value, dict) or len(value) != 1:
        raise RecipeError(f"{where} must have exactly one key, not {value!r}")
    return next((str(key), inner) for key, inner in value.items())


def _settings(cls: type[_Settings], value: Any, where: str) -> _Settings:
    value = {} if value is None else value
    if not isinstance(value, dict):
        raise RecipeError(f"{where}: expected settings, not {value!r}")
    _check_keys(value, list(cls.model_fields), where)
    try:
        return cls(**value)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join([where, *(str(part) for part in first["loc"])])
        raise RecipeError(f"{place}: {first['msg'].removeprefix('Value error, ')}") from None


def _typed(hint: Any, value: Any, where: str) -> Any:
    try:
        return TypeAdapter(hint).validate_python(value, strict=not isinstance(value, int | list))
    except ValidationError as error:
        raise RecipeError(f"{where}: {error.errors()[0]['msg']} (got {value!r})") from None


def _check_keys(value: dict[str, Any], known: Any, where: str) -> None:
    for key in value:
        if key not in known:
            raise RecipeError(f"{where}: unknown key {key!r}{_nearest(str(key), known)}")


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)  # of names as short as w4
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


def _method_settings(value: Any, name: str) -> Any:
    if isinstance(value, dict):
        if name in value and name in METHODS:
            yield value
        for inner in value.values():
            yield from _method_settings(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from _method_settings(inner, name)

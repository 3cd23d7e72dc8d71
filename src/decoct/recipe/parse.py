"""A recipe as plain data in, stages out. A method's fields are its keys; a wrong key names the nearest one."""

from dataclasses import MISSING, dataclass, fields
from typing import Any, get_type_hints

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
)
from decoct.methods.depth import DepthMethod
from decoct.methods.experts import ExpertMethod
from decoct.methods.prune.slicegpt import SliceGPT
from decoct.methods.quantize.e2e_qp import E2EQP
from decoct.methods.width import WidthMethod
from decoct.recipe.checks import RecipeError, check_keys, nearest, settings_of, share, single, strings, typed
from decoct.recipe.spell import method_settings, step_settings
from decoct.search.settings import Search
from decoct.training.stages import own_stage

_RULE_KEYS = ("match", "min_share", "leave")
_BLOCK_METHODS = [name for name, cls in METHODS.items() if issubclass(cls, BlockStep)]
_MODEL_METHODS = [name for name, cls in METHODS.items() if issubclass(cls, ModelMethod)]
_CACHE_METHODS = [name for name, cls in METHODS.items() if issubclass(cls, CacheMethod)]
_TOP_KEYS = ("name", "about", "data", "budget", "search", "stages", "export")


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


def parse_recipe(value: dict[str, Any]) -> Recipe:
    """Check a recipe given as plain data.

    Raises:
        RecipeError: an unknown key (the nearest right one is named), a value of the wrong type or out of range.
    """
    check_keys(value, _TOP_KEYS, "recipe")
    stages = value.get("stages")
    if not isinstance(stages, list) or not stages:
        raise RecipeError("a recipe needs stages: a list such as [{blocks: [{linear: {gptq: {bits: 4}}}]}]")
    export = value.get("export") or []
    return Recipe(
        stages=tuple(_stage(stage, f"stages[{i}]") for i, stage in enumerate(stages)),
        data=settings_of(Data, value.get("data"), "data"),
        budget=settings_of(Budget, value.get("budget"), "budget"),
        export=strings(export, "export"),
        search=None if value.get("search") is None else settings_of(Search, value["search"], "search"),
    )


def build_method(name: str, value: Any, where: str) -> AnyMethod:
    """One method from its name and fields.

    Raises:
        RecipeError: as for `parse_recipe`.
    """
    cls = METHODS.get(name)
    if cls is None:
        raise RecipeError(f"{where}: unknown method {name!r}{nearest(name, METHODS)}")
    value = {} if value is None else value
    if not isinstance(value, dict):
        raise RecipeError(f"{where}.{name}: expected settings such as {{bits: 4}}, not {value!r}")
    known = [field.name for field in fields(cls)]
    check_keys(value, known, f"{where}.{name}")
    hints = get_type_hints(cls)
    checked: dict[str, Any] = {}
    for field in fields(cls):
        if field.name in value:
            checked[field.name] = typed(hints[field.name], value[field.name], f"{where}.{name}.{field.name}")
        elif field.default is MISSING and field.default_factory is MISSING:
            raise RecipeError(f"{where}.{name} needs {field.name}")
    try:
        return cls(**checked)
    except ValueError as error:
        raise RecipeError(f"{where}.{name}: {error}") from None


def _stage(value: Any, where: str) -> Stage:
    kind, inner = single(value, where)
    if kind in _MODEL_METHODS:
        return _model_stage(build_method(kind, inner, where))
    if kind == "cache":
        name, settings = single(inner, f"{where}.cache")
        if name not in _CACHE_METHODS:
            raise RecipeError(
                f"{where}.cache: {name!r} is no policy for keys and values{nearest(name, _CACHE_METHODS)}"
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
        raise RecipeError(f"{where}: unknown stage {kind!r}{nearest(kind, ['blocks', 'cache', *_MODEL_METHODS])}")
    if not isinstance(inner, list) or not inner:
        raise RecipeError(f"{where}.blocks must be a list of steps, such as [{{linear: {{gptq: {{bits: 4}}}}}}]")
    steps = tuple(_step(step, f"{where}.blocks[{i}]") for i, step in enumerate(inner))
    return BlocksStage(steps, {"blocks": [step_settings(step) for step in steps]})


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
    kind, inner = single(value, where)
    if kind != "linear":
        if kind not in METHODS:
            raise RecipeError(f"{where}: unknown step {kind!r}{nearest(kind, ['linear', *_BLOCK_METHODS])}")
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
            raise RecipeError(f"{where}: unknown key {name!r}{nearest(name, [*METHODS, *_RULE_KEYS])}")
    leave = typed(bool, value.get("leave", False), f"{where}.leave")
    if len(names) != (0 if leave else 1):
        raise RecipeError(f"{where}: give exactly one method, or leave: true (found {', '.join(names) or 'none'})")
    match = value.get("match", "*")
    patterns = strings(match, f"{where}.match")
    if not patterns:
        raise RecipeError(f"{where}.match is an empty list; name roles or matrices, or leave match out for all")
    min_share = share(value.get("min_share", 0.0), f"{where}.min_share")
    method = None if leave else _guided(names[0], value[names[0]], where)
    if isinstance(method, BlockStep):
        raise RecipeError(f"{where}: {names[0]} works on whole blocks; write it as a step of its own, beside linear")
    if isinstance(method, ModelMethod | CacheMethod):
        raise _no_step(method, names[0], where)
    return Rule(patterns, method, min_share)


def _guided(name: str, value: Any, where: str) -> AnyMethod:
    """A method for single matrices; its settings may have `guided` beside its own keys."""
    if not isinstance(value, dict) or not value.get("guided"):
        own = {key: each for key, each in value.items() if key != "guided"} if isinstance(value, dict) else value
        return build_method(name, own, where)
    method = build_method(name, {key: each for key, each in value.items() if key != "guided"}, where)
    groups = typed(int, value["guided"], f"{where}.{name}.guided")
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

"""Steps and methods as a recipe spells them."""

from dataclasses import asdict
from typing import Any

from decoct.engine.plan import StepRules
from decoct.engine.rules import Rule
from decoct.methods import AnyMethod, Guided, name_of


def method_settings(method: AnyMethod) -> dict[str, Any]:
    """A method as a recipe spells it: `{"gptq": {"bits": 4, …}}`."""
    if isinstance(method, Guided):
        ((name, settings),) = method_settings(method.method).items()
        return {name: {**settings, "guided": method.groups}}
    name = name_of(method)
    return {name: asdict(method)}


def step_settings(step: StepRules) -> dict[str, Any]:
    """A step as a recipe spells it: `{"linear": [{"match": …, "gptq": …}]}`, or the method on blocks."""
    return {"linear": [_rule_settings(r) for r in step]} if isinstance(step, tuple) else method_settings(step)


def _rule_settings(rule: Rule) -> dict[str, Any]:
    share = {"min_share": rule.min_share} if rule.min_share else {}
    method = {"leave": True} if rule.method is None else method_settings(rule.method)
    return {"match": list(rule.match), **share, **method}

"""Which method compresses which slot: ordered rules over roles and names; the first that matches decides."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from math import prod
from typing import Any

from decoct.arch import Slot
from decoct.engine.shallow import is_nothing
from decoct.methods import BlockMethod, BlockStep, ByGroup, GainRefit, LinearCorrection, LinearMethod
from decoct.model import Model
from decoct.stats import PairedGram

Method = LinearMethod | LinearCorrection


@dataclass(frozen=True, slots=True)
class Rule:
    """Slots that match get `method`; None leaves them alone.

    Attributes:
        match: shell patterns. Each is compared with a slot's role ("mlp.down"), its address ("3.mlp.down", the block
            first) and its full name. Routers, embeddings and lm_head match only a pattern that is their role or name.
        method: what to do, or None.
        min_share: apply only if the matching slots hold at least this fraction of the model's parameters. Where it is
            above 0, a rule may match nothing: it is for models that have such slots.
    """

    match: tuple[str, ...] = ("*",)
    method: Method | None = None
    min_share: float = 0.0


@dataclass(frozen=True, slots=True)
class Assignment:
    """The outcome of one step's rules over a whole model.

    Attributes:
        methods: method by full slot name; slots that are left alone are absent.
        left: full names of slots that no rule, or a rule without a method, covers, or that hold nothing any more.
    """

    methods: dict[str, Method] = field(default_factory=dict)
    left: tuple[str, ...] = ()


Resolved = Assignment | BlockStep
"""A step, resolved against a model."""


def is_paired(step: Resolved) -> bool:
    """Whether a step compares with the model as it was: a second chain of activations must run beside the first."""
    if isinstance(step, Assignment):
        return any(reads_pairs(method) for method in step.methods.values())
    return isinstance(step, BlockMethod | GainRefit)


def reads_pairs(method: Method | BlockMethod) -> bool:
    """Whether a method's statistic takes the uncompressed model's inputs beside the compressed one's."""
    return (method.stat.kind if isinstance(method.stat, ByGroup) else method.stat) is PairedGram


def statistic(method: Method, slot: Slot) -> Any:
    """The kind of statistic that a method needs of a slot's inputs, or None; where it is guided, the slot's own."""
    return replace(method.stat, slot=slot.name) if isinstance(method.stat, ByGroup) else method.stat


def assign(model: Model, rules: tuple[Rule, ...]) -> Assignment:
    """Resolve a step's rules.

    Raises:
        ValueError: a rule that applies whatever its share matches nothing, or nothing that earlier rules leave to it.
    """
    slots = model.slots()
    total = model.num_parameters
    addresses = {name: tuple(_addresses(model, name, slot)) for name, slot in slots.items()}
    decided: dict[str, Method | None] = {}
    for rule in rules:
        hits = [name for name, slot in slots.items() if _matches(rule, slot, addresses[name])]
        if not hits and not rule.min_share:
            roles = sorted({slot.role for slot in slots.values()})
            raise ValueError(f"rule {', '.join(rule.match)!r} matches nothing; this model's roles: {', '.join(roles)}")
        share = sum(prod(model.shape(name)) for name in hits) / total
        if share < rule.min_share:
            continue
        gone = {name for name in hits if name in model.described and is_nothing(model.described[name])}
        wanted = {name: None if name in gone else rule.method for name in hits}
        if (
            not rule.min_share
            and rule.match != ("*",)  # for whatever is left, if anything is
            and wanted.keys() <= decided.keys()
            and any(decided[name] != wanted[name] for name in hits)
        ):
            raise ValueError(
                f"rule {', '.join(rule.match)!r} never applies: the rules before it take all that it matches, and the "
                "first that matches decides; put it before them, or leave it out"
            )
        decided = wanted | decided
    methods = {name: decided[name] for name in slots if decided.get(name) is not None}
    return Assignment(
        {name: method for name, method in methods.items() if method is not None},
        tuple(name for name in slots if name not in methods),
    )


def _addresses(model: Model, name: str, slot: Slot) -> Iterator[str]:
    yield slot.role
    yield name
    if slot.role == "embed" and model.tied:
        yield "lm_head"
    prefix = f"{model.family.blocks}."
    if name.startswith(prefix):
        block = name.removeprefix(prefix).split(".", 1)[0]
        yield f"{block}.{slot.role}"
        if slot.expert is not None:
            yield f"{block}.{slot.expert}.{slot.role}"


def _matches(rule: Rule, slot: Slot, addresses: tuple[str, ...]) -> bool:
    if slot.protected:
        return any(pattern in addresses for pattern in rule.match)
    return any(fnmatchcase(address, pattern) for pattern in rule.match for address in addresses)

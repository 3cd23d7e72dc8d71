"""What a search chooses bits or sparsities for: the matrices that a method meets, and which of them go together."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any

from decoct.engine.rehearse import compressible_shape, rehearse
from decoct.engine.rules import Assignment, Method, Rule, assign
from decoct.engine.stages import BlocksStage, Stage
from decoct.methods import Guided, LinearMethod, Rotation, name_of
from decoct.methods.pruning import Pruning
from decoct.model import Model
from decoct.search.settings import WIDTHS, Level, Search
from decoct.weights import Masked, Sparse, described_kinds

Choice = Mapping[str, Level]
"""Bits or sparsities by full slot name; slots that are absent are left uncompressed."""


_NOTHING = {
    "bits": "no method of this recipe has bits to choose; take one with gptq, or a preset such as w4 (for sparsities, "
    "give search.sparsity or search.levels)",
    "sparsity": "no method of this recipe has a sparsity to choose (n of m has none); take one with sparsegpt, or the "
    "preset sparse50",
}


@dataclass(frozen=True, slots=True)
class Tied:
    """Slots that get the same level: those of a block that read the same edge and meet the same rule.

    Attributes:
        label: the block's number and the roles, for people.
        role: the roles alone: the same for every block.
        names: full names.
    """

    label: str
    role: str
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Target:
    """The part of a recipe in which one setting of one method is chosen.

    Attributes:
        model: whose matrices.
        stage: number of the stage.
        step: number of the step in it.
        setting: bits or sparsity.
        method: whose setting is chosen, as its class.
        levels: to choose from, the smallest result first: bits rising, sparsities falling.
        ties: the groups that get a level together, in the model's order.
        entries: weights of all the searched matrices, uncompressed.
    """

    model: Model
    stage: int
    step: int
    setting: str
    method: type[LinearMethod]
    levels: tuple[Level, ...]
    ties: tuple[Tied, ...]
    entries: int
    _steps: tuple[Assignment, ...]
    _rules: tuple[Rule, ...]

    @property
    def names(self) -> list[str]:
        """Full names of the searched matrices."""
        return [name for tie in self.ties for name in tie.names]

    def steps(self, level: Level) -> tuple[Assignment, ...]:
        """What the stage's linear steps do to the searched matrices if all get this level.

        Raises:
            ValueError: the method does not have it.
        """
        return tuple(
            Assignment({name: self._at(method, level) for name, method in each.methods.items()}) for each in self._steps
        )

    def _at(self, method: Method, level: Level) -> Method:
        if isinstance(method, LinearMethod) and _chooses(method, self.method, self.setting):
            return with_level(method, self.setting, level)
        return method

    def weights_kept(self, level: Level) -> int:
        """Of all the searched matrices if all get this sparsity, as the method rounds it."""
        found = 0
        for name in self.names:
            method = next(m for step in self.steps(level) for m in [step.methods.get(name)] if isinstance(m, Pruning))
            shape = compressible_shape(self.model, name)
            pattern = method.pattern(shape)
            found += prod(shape) - pattern.num_dropped * (prod(shape) // pattern.run)
        return found

    def sizes(self, level: Level | None = None) -> dict[str, int]:
        """Predicted bytes of each searched matrix, everything that the steps store counted.

        Args:
            level: of every one of them; None: as the recipe has it.

        Raises:
            ValueError: this level does not fit the matrices or the steps.
        """
        rehearsal = rehearse(self.model, [self._steps if level is None else self.steps(level)])
        found = {}
        for name in self.names:
            made = rehearsal.made(name)
            assert made is not None
            found[name] = round(made.nbytes.of(*compressible_shape(self.model, name)))
        return found

    def rules(self, choice: Choice) -> tuple[Rule, ...]:
        """The step's rules with these levels: exceptions by address, the commonest level by the rule's own match."""
        made: list[Rule] = []
        address = _addresses(self.model)
        for number, rule in enumerate(self._rules):
            if not _chooses(rule.method, self.method, self.setting):
                made.append(rule)
                continue
            assert isinstance(rule.method, LinearMethod)
            mine = sorted(_decided(self.model, self._rules, number), key=list(choice).index)
            entries: Counter[Level] = Counter()
            for name in mine:
                entries[choice[name]] += prod(self.model.shape(name))
            order = sorted(entries, key=lambda level: (entries[level], level))
            for level in sorted(order[:-1]):
                names = tuple(address[name] for name in mine if choice[name] == level)
                made.append(Rule(names, with_level(rule.method, self.setting, level)))
            made.append(replace(rule, method=with_level(rule.method, self.setting, order[-1])) if order else rule)
        return tuple(made)


def with_level(method: LinearMethod, setting: str, level: Level) -> LinearMethod:
    """The same method with another level of a setting.

    Raises:
        ValueError: it does not have this level.
    """
    changes: dict[str, Any] = {setting: level}
    return replace(method, **changes)


def find_target(model: Model, stages: tuple[Stage, ...], search: Search) -> Target:
    """The method whose setting is chosen: of those that have the setting, the one that meets most of the model.

    Raises:
        ValueError: no such method, or a recipe that a search cannot look at as a whole.
    """
    streamed = [number for number, stage in enumerate(stages) if isinstance(stage, BlocksStage)]
    if not streamed:
        what, preset = ("bits", "w4") if search.setting == "bits" else ("sparsities", "sparse50")
        raise ValueError(
            f"{what} are chosen for matrices, and this recipe has no blocks stage that compresses any; leave the "
            f"target out, or add such a recipe, as the preset {preset}"
        )
    if len(streamed) != 1:
        raise ValueError("a search needs a recipe with one streamed stage; put the steps of both into one blocks list")
    stage = stages[streamed[0]]
    assert isinstance(stage, BlocksStage)
    if any(isinstance(step, Rotation) for step in stage.steps):
        raise ValueError(
            "a search compares matrices as the model has them, not rotated ones; leave the rotation out, or give "
            f"{search.setting} by hand"
        )
    rules = {number: step for number, step in enumerate(stage.steps) if isinstance(step, tuple)}
    assigned = {number: assign(model, step) for number, step in rules.items()}
    if any(isinstance(method, Guided) for each in assigned.values() for method in each.methods.values()):
        raise ValueError(
            f"a search chooses {search.setting} without guided; leave it out, and add it to the recipe that is found"
        )
    met: Counter[tuple[int, type[LinearMethod]]] = Counter()
    for number, each in assigned.items():
        for name, method in each.methods.items():
            if isinstance(method, LinearMethod) and _has(method, search.setting) and not method.quantizes_inputs:
                met[number, type(method)] += prod(model.shape(name))
    if not met:
        raise ValueError(_NOTHING[search.setting])
    step, kind = max(met, key=lambda each: met[each])
    chosen = {n: m for n, m in assigned[step].methods.items() if _chooses(m, kind, search.setting)}
    searched, first = set(chosen), next(m for m in chosen.values() if isinstance(m, LinearMethod))
    if any(isinstance(method, Pruning) and method.owl for method in chosen.values()):
        raise ValueError("owl divides a sparsity among blocks by a rule of its own; leave it out of a search")
    found = Target(
        model=model,
        stage=streamed[0],
        step=step,
        setting=search.setting,
        method=kind,
        levels=_levels(first, search),
        ties=tuple(_ties(model, rules[step], kind, search.setting)),
        entries=sum(prod(model.shape(name)) for name in searched),
        _steps=tuple(
            Assignment({name: method for name, method in each.methods.items() if name in searched})
            for each in assigned.values()
        ),
        _rules=rules[step],
    )
    _check_masks(found)
    return found


def _check_masks(target: Target) -> None:
    """Refuse to choose sparsities where what comes of a matrix does not tell which weights are gone.

    Raises:
        ValueError: it does not.
    """
    if target.setting != "sparsity":
        return
    rehearsal = rehearse(target.model, [target.steps(target.levels[0])])
    for name in target.names:
        made = rehearsal.made(name)
        assert made is not None
        if not described_kinds(made.forms[0][1]) & {Masked.kind, Sparse.kind}:
            raise ValueError(f"{name}: nothing that is left of it tells which weights go; leave later steps out")


def _chooses(method: object, kind: type[LinearMethod], setting: str) -> bool:
    """Whether a method is one whose setting is chosen."""
    return isinstance(method, kind) and _has(method, setting)


def _has(method: LinearMethod, setting: str) -> bool:
    settings = asdict(method)
    if setting == "sparsity" and settings.get("n") is not None:
        return False  # of every m weights n survive, whatever its sparsity says
    return settings.get(setting) is not None


def _levels(method: LinearMethod, search: Search) -> tuple[Level, ...]:
    """Those that were asked for, or of the usual ones those that the method has."""
    if search.setting == "sparsity":
        sparsities = search.sparsities()
        _check_levels(method, search.setting, sparsities, "levels")
        return sparsities
    if search.widths is not None:
        _check_levels(method, search.setting, search.widths, "widths")
        return search.widths
    found = []
    for bits in WIDTHS:
        try:
            with_level(method, "bits", bits)
        except ValueError:
            continue
        found.append(bits)
    if len(found) < 2:
        settings = ", ".join(f"{key}: {value}" for key, value in asdict(method).items())
        raise ValueError(f"with these settings ({settings}) there is only one number of bits; change another setting")
    return tuple(found)


def _check_levels(method: LinearMethod, setting: str, levels: tuple[Level, ...], key: str) -> None:
    """Refuse levels that the method does not have.

    Raises:
        ValueError: one of them; names the search's key that has it.
    """
    for level in levels:
        try:
            with_level(method, setting, level)
        except ValueError as error:
            raise ValueError(f"search.{key}: {name_of(method)}'s {error}") from None


def _decided(model: Model, rules: tuple[Rule, ...], number: int) -> set[str]:
    """The slots whose method a rule decides."""
    return assign(model, rules[: number + 1]).methods.keys() - assign(model, rules[:number]).methods.keys()


def _ties(model: Model, rules: tuple[Rule, ...], kind: type[LinearMethod], setting: str) -> Iterator[Tied]:
    slots = model.slots()
    blocks = {model.prefix(b) + slot.name: b for b in range(model.num_blocks) for slot in model.block_slots}
    groups: dict[tuple[int | None, str, int], list[str]] = {}
    rule_of = {
        name: number
        for number, rule in enumerate(rules)
        if _chooses(rule.method, kind, setting)
        for name in _decided(model, rules, number)
    }
    for name, slot in slots.items():
        if name in rule_of:
            groups.setdefault((blocks.get(name), slot.reads, rule_of[name]), []).append(name)
    for (block, _, _), names in groups.items():
        role = " ".join(slots[name].role for name in names)
        yield Tied(role if block is None else f"{block}. {role}", role, tuple(names))


def _addresses(model: Model) -> dict[str, str]:
    """The shortest pattern that a rule matches each slot by: block and role, or the full name where they are shared."""
    found = {}
    for name, slot in model.slots().items():
        found[name] = slot.role
        if name.startswith(f"{model.family.blocks}."):
            block = name.removeprefix(f"{model.family.blocks}.").split(".", 1)[0]
            expert = "" if slot.expert is None else f"{slot.expert}."
            found[name] = f"{block}.{expert}{slot.role}"
    counts = Counter(found.values())
    return {name: address if counts[address] == 1 else name for name, address in found.items()}

"""What a search chooses bits for: the matrices that a recipe's quantizer meets, and which of them go together."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from math import prod

from decoct.engine.rehearse import rehearse
from decoct.engine.rules import Assignment, Rule, assign
from decoct.engine.stages import BlocksStage, Stage
from decoct.methods import Guided, LinearMethod, Rotation
from decoct.model import Model
from decoct.search.settings import WIDTHS, Search

Choice = Mapping[str, int]
"""Bits by full slot name; slots that are absent are left uncompressed."""


@dataclass(frozen=True, slots=True)
class Tied:
    """Slots that get the same bits: those of a block that read the same edge and meet the same rule.

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
    """The part of a recipe whose bits are chosen.

    Attributes:
        model: whose matrices.
        stage: number of the stage.
        step: number of the step in it.
        method: the key of the method in METHODS whose `bits` are chosen, as its class.
        widths: to choose from, rising.
        ties: the groups that get bits together, in the model's order.
        entries: weights of all the searched matrices, uncompressed.
    """

    model: Model
    stage: int
    step: int
    method: type[LinearMethod]
    widths: tuple[int, ...]
    ties: tuple[Tied, ...]
    entries: int
    _steps: tuple[Assignment, ...]
    _rules: tuple[Rule, ...]

    @property
    def names(self) -> list[str]:
        """Full names of the searched matrices."""
        return [name for tie in self.ties for name in tie.names]

    def steps(self, bits: int) -> tuple[Assignment, ...]:
        """What the stage's linear steps do to the searched matrices if all get these bits.

        Raises:
            ValueError: the method does not have these bits.
        """
        return tuple(
            Assignment(
                {name: with_bits(m, bits) if isinstance(m, self.method) else m for name, m in each.methods.items()}
            )
            for each in self._steps
        )

    def sizes(self, bits: int | None = None) -> dict[str, int]:
        """Predicted bytes of each searched matrix, everything that the steps store counted.

        Args:
            bits: for every one of them; None: as the recipe has it.

        Raises:
            ValueError: these bits do not fit the matrices or the steps.
        """
        rehearsal = rehearse(self.model, [self._steps if bits is None else self.steps(bits)])
        found = {}
        for name in self.names:
            made = rehearsal.made(name)
            assert made is not None
            out, cols = self.model.shape(name)
            found[name] = round(made.nbytes.of(out, cols))
        return found

    def rules(self, choice: Choice) -> tuple[Rule, ...]:
        """The step's rules with these bits: exceptions by address, the commonest width by the rule's own match."""
        made: list[Rule] = []
        address = _addresses(self.model)
        for number, rule in enumerate(self._rules):
            if not isinstance(rule.method, self.method):
                made.append(rule)
                continue
            mine = sorted(_decided(self.model, self._rules, number), key=list(choice).index)
            entries: Counter[int] = Counter()
            for name in mine:
                entries[choice[name]] += prod(self.model.shape(name))
            order = sorted(entries, key=lambda bits: (entries[bits], bits))
            for bits in sorted(order[:-1]):
                names = tuple(address[name] for name in mine if choice[name] == bits)
                made.append(Rule(names, with_bits(rule.method, bits)))
            made.append(replace(rule, method=with_bits(rule.method, order[-1])) if order else rule)
        return tuple(made)


def with_bits(method: LinearMethod, bits: int) -> LinearMethod:
    """The same method with other bits.

    Raises:
        ValueError: it does not have these.
    """
    changes = {"bits": bits}
    return replace(method, **changes)


def find_target(model: Model, stages: tuple[Stage, ...], search: Search) -> Target:
    """The quantizer whose bits are chosen: of the methods with `bits`, the one that meets most of the model.

    Raises:
        ValueError: no such method, or a recipe that a search cannot look at as a whole.
    """
    streamed = [number for number, stage in enumerate(stages) if isinstance(stage, BlocksStage)]
    if len(streamed) != 1:
        raise ValueError("a search needs a recipe with one streamed stage; put the steps of both into one blocks list")
    stage = stages[streamed[0]]
    assert isinstance(stage, BlocksStage)
    if any(isinstance(step, Rotation) for step in stage.steps):
        raise ValueError(
            "a search compares matrices as the model has them, not rotated ones; leave the rotation out, or give bits "
            "by hand"
        )
    rules = {number: step for number, step in enumerate(stage.steps) if isinstance(step, tuple)}
    assigned = {number: assign(model, step) for number, step in rules.items()}
    if any(isinstance(method, Guided) for each in assigned.values() for method in each.methods.values()):
        raise ValueError("a search chooses bits without guided; leave it out, and add it to the recipe that is found")
    met: Counter[tuple[int, type[LinearMethod]]] = Counter()
    for number, each in assigned.items():
        for name, method in each.methods.items():
            if isinstance(method, LinearMethod) and _has_bits(method) and not method.quantizes_inputs:
                met[number, type(method)] += prod(model.shape(name))
    if not met:
        raise ValueError("no method of this recipe has bits to choose; take one with gptq, or a preset such as w4")
    step, kind = max(met, key=lambda each: met[each])
    searched = {name for name, method in assigned[step].methods.items() if isinstance(method, kind)}
    first = next(method for method in assigned[step].methods.values() if isinstance(method, kind))
    return Target(
        model=model,
        stage=streamed[0],
        step=step,
        method=kind,
        widths=_widths(first, search),
        ties=tuple(_ties(model, rules[step], kind)),
        entries=sum(prod(model.shape(name)) for name in searched),
        _steps=tuple(
            Assignment({name: method for name, method in each.methods.items() if name in searched})
            for each in assigned.values()
        ),
        _rules=rules[step],
    )


def _has_bits(method: LinearMethod) -> bool:
    return any(field.name == "bits" for field in fields(method))


def _widths(method: LinearMethod, search: Search) -> tuple[int, ...]:
    """Those that were asked for, or of the usual ones those that the method has."""
    if search.widths is not None:
        for bits in search.widths:
            with_bits(method, bits)
        return search.widths
    found = []
    for bits in WIDTHS:
        try:
            with_bits(method, bits)
        except ValueError:
            continue
        found.append(bits)
    if len(found) < 2:
        settings = ", ".join(f"{key}: {value}" for key, value in asdict(method).items())
        raise ValueError(f"with these settings ({settings}) there is only one number of bits; change another setting")
    return tuple(found)


def _decided(model: Model, rules: tuple[Rule, ...], number: int) -> set[str]:
    """The slots whose method a rule decides."""
    return assign(model, rules[: number + 1]).methods.keys() - assign(model, rules[:number]).methods.keys()


def _ties(model: Model, rules: tuple[Rule, ...], kind: type[LinearMethod]) -> Iterator[Tied]:
    slots = model.slots()
    blocks = {model.prefix(b) + slot.name: b for b in range(model.num_blocks) for slot in model.block_slots}
    groups: dict[tuple[int | None, str, int], list[str]] = {}
    rule_of = {
        name: number
        for number, rule in enumerate(rules)
        if isinstance(rule.method, kind)
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

"""From a recipe and a target to every matrix's bits or sparsity: candidates, costs, a choice, and what evolves from it.

Everything that takes time is saved beside the run, so that a search that is killed goes on where it was:

    search/model-*         every searched matrix at every level, and their journal; removed once the levels are chosen
    search/states/         hidden states and gradients; removed with them
    search/costs.json      what each candidate costs and weighs
    search/factors.json    true divergences over estimated ones, by role and level
    search/evolution.json  the last generation
    search/choice.json     the levels
"""

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from decoct.engine.admission import (
    calibration_tokens,
    check_output,
    check_source_tensors,
    data_record,
    discard,
    short_digest,
)
from decoct.engine.disk import DONE_FOLDER, RUN_FOLDER
from decoct.engine.job import Job, Watch
from decoct.engine.journal import JOURNAL, Journal, exclusive, recorded_dtype
from decoct.engine.stream import Event
from decoct.search.candidates import Candidates, make_candidates
from decoct.search.evolve import Generation, Options, evolve
from decoct.search.measure import Measurer
from decoct.search.plan import SearchPlan, budget_for, check_room, plan_search
from decoct.search.sensitivity import Costs, find_costs
from decoct.search.settings import Level, Search
from decoct.search.solve import solve
from decoct.search.target import Target
from decoct.store import read_json, write_json
from decoct.version import __version__

FOLDER = "search"
"""Inside the run's folder."""

_Sizes = dict[str, dict[Level, int]]
_Number = TypeVar("_Number", int, float)


@dataclass(frozen=True, slots=True)
class Found:
    """What a search chose.

    Attributes:
        setting: what was chosen for each matrix: bits or sparsity.
        choice: its level by full slot name.
        nbytes: of the searched matrices, everything that they store counted.
        bits: the same, for each of their weights.
        sparsity: fraction of these weights that is removed; None where bits were chosen.
        cost: what the estimates say that it costs, nats a token.
        divergence: measured on calibration text, nats a token; None if nothing evolved.
        first: the same of the estimates' own choice, from which the evolution began.
    """

    setting: str
    choice: dict[str, Level]
    nbytes: int
    bits: float
    sparsity: float | None
    cost: float
    divergence: float | None
    first: float | None


def find_bits(job: Job, search: Search, watch: Watch) -> tuple[Target, Found]:
    """Search, or go on with it where an earlier process stopped.

    `job.fresh` is obeyed here: what follows must not discard once more.

    Raises:
        ValueError: anything the user can mend; one line that says what to do.
    """
    run = job.out / RUN_FOLDER
    dtype = None if job.fresh else recorded_dtype(run / FOLDER / JOURNAL)
    plan = plan_search(job.model, job.stages, job.data, job.budget, search, dtype)
    if not job.fresh:
        for folder in (job.out / DONE_FOLDER, run):
            found = _chosen(folder / FOLDER / "choice.json", job, search, plan.target)
            if found is not None:
                return plan.target, found
        if any(run.glob(f"stage-*/{JOURNAL}")):
            raise ValueError(
                f"{job.out} holds an unfinished run with another choice; repeat the first command to finish it, add "
                "--fresh to discard it, or choose another output folder"
            )
    check_output(job, run)
    with exclusive(run):
        check_source_tensors(job.model)
        tokens = calibration_tokens(job, run, watch)
        if job.fresh:  # not before what may be refused
            discard(job.out, run)
        check_room(plan, job.out, run / FOLDER)
        return plan.target, _Searcher(job, search, plan, tokens, run / FOLDER, watch).run()


class _Searcher:
    """One search's folder and what lies there already."""

    def __init__(self, job: Job, search: Search, plan: SearchPlan, tokens: Tensor, folder: Path, watch: Watch) -> None:
        held = search.held_out(len(tokens))
        self._job, self._search, self._plan = job, search, plan
        self._making, self._judging = tokens[: -held if held < len(tokens) else None], tokens[-held:]
        self._target, self._folder, self._watch = plan.target, folder, watch
        self._identity = {
            **_identity(job, search, plan.target),
            "data": data_record(job.data, tokens),
            "compute_dtype": str(plan.dtype).removeprefix("torch."),
        }
        self._made: Candidates | None = None
        self._compared: Measurer | None = None

    def run(self) -> Found:
        """Every phase that is not done yet."""
        costs, nbytes, kept = self._costs()
        target, search = self._target, self._search
        table, in_bytes = self._by_tie(self._corrected(costs)), self._by_tie(nbytes)
        amounts = in_bytes if search.sparsity is None else self._by_tie(kept)
        reach = sum(min(each) for each in amounts), sum(max(each) for each in amounts)
        budget = budget_for(search, self._plan, reach)
        best = Generation(0, tuple(solve(table, amounts, budget)))
        if search.generations and search.num_measured:
            best = self._evolved(best, amounts, budget)
        taken = _chosen_sum(in_bytes, best.parent)
        found = Found(
            setting=target.setting,
            choice=self._choice(best.parent),
            nbytes=taken,
            bits=8 * taken / target.entries,
            sparsity=1 - _chosen_sum(self._by_tie(kept), best.parent) / target.entries if kept else None,
            cost=_chosen_sum(table, best.parent),
            divergence=best.divergence,
            first=best.first,
        )
        _write_choice(self._folder / "choice.json", self._job, search, target, found)
        shutil.rmtree(self._folder / "states", ignore_errors=True)
        (self._folder / JOURNAL).unlink(missing_ok=True)
        for path in self._folder.glob("model-*"):
            path.unlink()
        return found

    def _by_tie(self, found: Mapping[str, Mapping[Level, _Number]]) -> list[list[_Number]]:
        """What each group's members have together, level by level."""
        target = self._target
        return [[sum(found[name][level] for name in tie.names) for level in target.levels] for tie in target.ties]

    def _candidates(self) -> Candidates:
        """Every matrix at every level; made now if they are not there (any more)."""
        if self._made is None:
            journal = Journal(self._folder, self._identity, self._folder)
            levels = ", ".join(map(str, self._target.levels))
            with_levels = f"with {levels} bits" if self._target.setting == "bits" else f"at sparsities of {levels}"
            self._watch.began(f"compressing every searched matrix {with_levels}")
            self._made = make_candidates(
                self._target, self._making, self._plan.dtype, self._folder, journal, self._watch.event
            )
        return self._made

    def _costs(self) -> tuple[Costs, _Sizes, _Sizes]:
        """Estimated costs, exact bytes, and, where sparsities are chosen, weights kept, by matrix and level."""
        path, target = self._folder / "costs.json", self._target
        saved = _saved(path, self._identity)
        if saved is None or not saved["complete"]:
            candidates = self._candidates()
            sizes = {n: {level: candidates.nbytes(n, level) for level in target.levels} for n in target.names}
            kept: _Sizes = {}
            if target.setting == "sparsity":
                kept = {n: {level: candidates.kept(n, level) for level in target.levels} for n in target.names}

            def save(costs: Costs, *, complete: bool = False) -> None:
                found = {"costs": costs, "sizes": sizes, "kept": kept}
                write_json(path, {"identity": self._identity, "complete": complete, **found})

            self._watch.began("measuring how much each matrix matters, from gradients")
            tokens = self._judging[: self._search.num_sequences]
            known = {} if saved is None else _by_level(saved["costs"])
            states = self._folder / "states"
            costs = find_costs(
                self._target, candidates, tokens, self._search.seed, states, known, save, self._watch.event
            )
            save(costs, complete=True)
            saved = _saved(path, self._identity)
            assert saved is not None
        return _by_level(saved["costs"]), _by_level(saved["sizes"]), _by_level(saved["kept"])

    def _corrected(self, costs: Costs) -> Costs:
        """The costs, each role's at each level multiplied by what a true measurement says of all blocks together."""
        if not self._search.num_measured:
            return costs
        factors = self._factors(costs)
        role = {name: tie.role for tie in self._target.ties for name in tie.names}
        return {
            name: {level: cost * factors[role[name]][level] for level, cost in each.items()}
            for name, each in costs.items()
        }

    def _factors(self, costs: Costs) -> Costs:
        """True divergence over estimated cost, by role and level, with that role's matrices alone compressed."""
        path = self._folder / "factors.json"
        saved = _saved(path, self._identity)
        if saved is None:
            roles: dict[str, list[str]] = {}
            for tie in self._target.ties:
                roles.setdefault(tie.role, []).extend(tie.names)
            self._watch.began("comparing the estimates with true divergences")
            measurer = self._measurer()
            factors: Costs = {}
            for number, (role, names) in enumerate(roles.items()):
                started = time.perf_counter()
                choices = [dict.fromkeys(names, level) for level in self._target.levels]
                true = measurer.divergences(choices, self._measured())
                estimates = [sum(costs[name][level] for name in names) for level in self._target.levels]
                factors[role] = {
                    level: found / estimate if found > 0 and estimate > 0 else 1.0
                    for level, found, estimate in zip(self._target.levels, true, estimates, strict=True)
                }
                seconds = time.perf_counter() - started
                self._watch.event(Event(f"true divergence, {role}", number + 1, len(roles), None, seconds, 0))
            write_json(path, {"identity": self._identity, "factors": factors})
            saved = _saved(path, self._identity)
            assert saved is not None
        return _by_level(saved["factors"])

    def _evolved(self, begin: Generation, sizes: Sequence[Sequence[int]], budget: int) -> Generation:
        """What the evolution makes of the estimates' choice."""
        path, search = self._folder / "evolution.json", self._search
        key = {**self._identity, "budget": budget, "offspring": search.offspring, "from": list(begin.parent)}
        saved = _saved(path, key)
        if saved is not None:
            scores = saved["divergence"], saved["first"], saved.get("idle", 0)
            begin = Generation(saved["number"], tuple(saved["parent"]), *scores)
        if begin.ended(search):
            return begin
        measurer = self._measurer()
        self._watch.began("changing the choice here and there, and keeping what is better")

        started = time.perf_counter()

        def keep(now: Generation) -> None:
            nonlocal started
            seconds, started = time.perf_counter() - started, time.perf_counter()
            write_json(path, {"identity": key, **asdict(now)})
            part, total = f"generation {now.number}", now.number if now.ended(search) else search.generations
            self._watch.event(Event(part, now.number, total, None, seconds, 0, loss=now.divergence))

        return evolve(
            begin,
            sizes,
            budget,
            lambda several, count: measurer.divergences([self._choice(each) for each in several], count),
            search,
            self._measured(),
            keep,
        )

    def _choice(self, options: Options) -> dict[str, Level]:
        levels = self._target.levels
        found = {n: levels[o] for tie, o in zip(self._target.ties, options, strict=True) for n in tie.names}
        return {name: found[name] for name in self._job.model.slots() if name in found}

    def _measured(self) -> int:
        """Sequences that true divergences are measured on."""
        return min(self._search.num_measured, len(self._judging))

    def _measurer(self) -> Measurer:
        """Kept, since it knows the uncompressed model's predictions."""
        if self._compared is None:
            self._compared = Measurer(self._target, self._candidates(), self._judging[: self._measured()])
        return self._compared


def _identity(job: Job, search: Search, target: Target) -> dict[str, Any]:
    """What the costs depend on; not the target, so that another one can be met with them."""
    source, kept = job.model.source, ("num_sequences", "num_measured", "seed")
    return {
        "decoct": __version__,
        "source": {"label": Path(source.label).name, "fingerprint": short_digest(source.fingerprint())},
        "stage": job.stages[target.stage].description,
        "setting": target.setting,
        "levels": list(target.levels),
        "search": {key: value for key, value in search.model_dump().items() if key in kept},
        "threads": torch.get_num_threads(),
    }


def _choice_key(job: Job, search: Search, target: Target) -> dict[str, Any]:
    """What a choice is for; known before any text is read."""
    data = {**job.data.model_dump(), "source": Path(job.data.source).name}
    return {"identity": _identity(job, search, target), "data": data, "search": search.model_dump()}


def _write_choice(path: Path, job: Job, search: Search, target: Target, found: Found) -> None:
    write_json(path, {**_choice_key(job, search, target), "found": asdict(found)})


def _chosen(path: Path, job: Job, search: Search, target: Target) -> Found | None:
    """What an earlier process chose for the same job; None if it did not come so far."""
    if not path.exists():
        return None
    saved = read_json(path)
    found = saved.pop("found")
    return Found(**found) if saved == _as_json(_choice_key(job, search, target)) else None


def _saved(path: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """A file of this search; None if there is none, or it belongs to another."""
    if not path.exists():
        return None
    value: dict[str, Any] = read_json(path)
    return value if value["identity"] == _as_json(identity) else None


def _as_json(value: dict[str, Any]) -> Any:
    return json.loads(json.dumps(value))


def _by_level(table: dict[str, dict[str, Any]]) -> dict[str, dict[Level, Any]]:
    """JSON turns numbers that are keys into text; this turns them back."""
    return {name: {json.loads(level): value for level, value in each.items()} for name, each in table.items()}


def _chosen_sum(table: Sequence[Sequence[_Number]], options: Options) -> _Number:
    return sum(each[option] for each, option in zip(table, options, strict=True))

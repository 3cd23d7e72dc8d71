"""What people see: tables on stdout, progress on stderr."""

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, Self

import rich.console
import yaml
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

if TYPE_CHECKING:
    from decoct.api import Inspection, MethodInfo
    from decoct.engine.job import Watch
    from decoct.engine.plan import Plan
    from decoct.engine.stages import RecipePlan
    from decoct.engine.stream import Event
    from decoct.engine.summary import Result
    from decoct.evaluation import Measurement
    from decoct.exporters import ExportReport
    from decoct.methods import AnyMethod
    from decoct.search import Found, SearchPlan

_SHOWN = (
    "bits",
    "key_bits",
    "value_bits",
    "group_size",
    "guided",
    "window",
    "sparsity",
    "keep",
    "keep_heads",
    "keep_hidden",
    "num_dropped",
    "bridge",
    "rank",
    "num_steps",
    "learning_rate",
)  # settings in a plan's table
_STEP_LINES = 16  # of a stage that takes many steps, so many, and the last, get a line of their own


def json_text(value: object) -> str:
    """One line of JSON; paths as text."""
    return json.dumps(value, default=lambda item: str(item) if isinstance(item, Path) else repr(item))


def fail(message: str, code: int, *, json: bool) -> NoReturn:
    """Say what went wrong in one line and end the process."""
    line = " ".join(message.split())
    sys.stderr.write(f"error: {line}\n")
    if json:
        sys.stdout.write(json_text({"error": line}) + "\n")
    sys.exit(code)


class Console:
    """Tables and progress in decoct's words (docs/STYLE.md)."""

    def __init__(self, console: rich.console.Console) -> None:
        self._console = console

    @classmethod
    def for_stdout(cls) -> Self:
        """Results."""
        return cls(rich.console.Console(highlight=False))

    @classmethod
    def for_stderr(cls) -> Self:
        """Progress and messages."""
        return cls(rich.console.Console(stderr=True, highlight=False))

    def line(self, text: str) -> None:
        """One line."""
        self._console.print(text, soft_wrap=True, markup=False)

    def inspection(self, found: "Inspection") -> None:
        """`decoct inspect`."""
        tied = ", lm_head tied to the embedding" if found.tied else ""
        self.line(f"{found.model}: {found.family}, {found.num_blocks} blocks, {found.dtype}{tied}")
        self.line(
            f"{_count(found.num_parameters)} parameters, {_size(found.nbytes)}, "
            f"{found.bits_per_weight:.2f} bits per weight"
        )
        table = _table("role", "weight", "*count", "*shape (out x in)", "*parameters", "*share")
        for row in found.roles:
            share = f"{100 * row.parameters / found.num_parameters:.1f} %"
            shape = f"{row.shape[0]} x {row.shape[1]}"
            table.add_row(row.role, row.kind, str(row.count), shape, _count(row.parameters), share)
        self._console.print(table)
        for name, settings in (found.cache or {}).items():
            stated = ", ".join(f"{key} {value}" for key, value in settings.items() if value is not None)
            self.line(f"keys and values: {name} ({stated})")
        for entry in found.lineage:
            self.line(
                f"made by decoct {entry.get('decoct')} from {entry.get('source', {}).get('label')} with the stage"
            )
            self.line(yaml.safe_dump([entry["stage"]], default_flow_style=None, sort_keys=False, width=110).rstrip())
            if "taken_out" in entry:
                self.line(f"  taken out: {', '.join(entry['taken_out'])}")
        if not found.lineage:
            self.line(f"next: decoct plan {found.model} --preset w4")

    def plan(self, found: "RecipePlan") -> None:
        """`decoct plan`."""
        for number, stage in enumerate(found.stages):
            self.stage_plan(stage, number + 1, len(found.stages))
        if len(found.stages) > 1:
            self.line("the whole recipe")
            self.line(f"result   about {_size(found.output_bytes)}, {found.bits_per_weight:.2f} bits per weight")
            self.line(f"memory   about {_size(found.peak_bytes)} of {_size(found.limit_bytes)} allowed")
            self.line(f"disk     about {_size(found.disk_bytes)} while it runs")
            self.line(f"time     about {_duration(found.seconds)}")
        if not found.weights_checked:
            self.line("weights  not checked for damage, which takes long; decoct compress does so before it begins")

    def stage_plan(self, found: "Plan", number: int, count: int) -> None:
        """One stage of `count`, as `decoct compress` shows it when the stage begins."""
        if count > 1:
            self.line(f"stage {number} of {count}: {found.kind}")
        table = _table("role", "*matrices", "*parameters", "what happens")
        for group in found.groups:
            what = " then ".join(_method(method) for method in group.methods) or "left alone"
            table.add_row(group.role, str(group.count), _count(group.parameters), what)
        self._console.print(table)
        where = "in memory" if found.in_memory else "on disk"
        calibration = f"calibration in {str(found.dtype).removeprefix('torch.')}"
        calibration += f", activations {where}" if found.kind == "blocks" else ""
        if found.share_left is not None:
            self.line(f"left     {found.share_left:.0%} of the parameters")
        self.line(f"result   about {_size(found.output_bytes)}, {found.bits_per_weight:.2f} bits per weight")
        self.line(f"memory   about {_size(found.peak_bytes)} of {_size(found.limit_bytes)} allowed")
        disk = found.output_bytes + found.scratch_bytes + found.checkpoint_bytes
        self.line(f"disk     about {_size(disk)} while it runs")
        self.line(
            f"time     about {_duration(found.seconds)} ({calibration if found.needs_data else 'no data needed'})"
        )
        for note in found.notes:
            self.line(f"warning: {note}")

    def search_plan(self, found: "SearchPlan") -> None:
        """What comes before a recipe whose bits or sparsities are searched."""
        target = found.target
        name = target.method.__name__.lower()
        levels = ", ".join(map(str, target.levels))
        self.line(
            f"search   {name}'s {target.setting}, from {levels}, for {len(target.ties)} groups of "
            f"{len(target.names)} matrices ({_count(target.entries)} weights)"
        )
        if found.wanted_sparsity is None:
            self.line(
                f"target   {found.wanted_bits:.2f} bits per weight of these, scales counted; "
                f"{found.least_bits:.2f} to {found.most_bits:.2f} can be had"
            )
        else:
            self.line(
                f"target   {100 * found.wanted_sparsity:g} % of these removed; "
                f"{100 * target.levels[-1]:g} to {100 * target.levels[0]:g} % can be had"
            )
        self.line(f"memory   about {_size(found.peak_bytes)} of {_size(found.limit_bytes)} allowed")
        self.line(f"disk     about {_size(found.disk_bytes)} while it runs")
        self.line(f"time     about {_duration(found.seconds)}, then the recipe with the choice that it finds:")

    def found(self, found: "Found") -> None:
        """What a search chose."""
        counts = Counter(found.choice.values())
        if found.sparsity is None:
            shown = ", ".join(f"{count} with {bits} bits" for bits, count in sorted(counts.items()))
            self.line(f"chose    {found.bits:.3f} bits per weight of the searched matrices: {shown}")
        else:
            shown = ", ".join(f"{count} without {100 * level:g} %" for level, count in sorted(counts.items()))
            self.line(f"chose    {100 * found.sparsity:.2f} % removed: {shown}")
        if found.divergence is not None and found.first is not None:
            self.line(f"KL       {found.divergence:.4f} on calibration text, {found.first:.4f} before the evolution")

    def result(self, result: "Result") -> None:
        """`decoct compress`."""
        self.line(
            f"wrote {result.folder}: {_size(result.nbytes)}, {result.bits_per_weight:.2f} bits per weight, "
            f"in {_duration(result.seconds)}, peak memory {_size(result.peak_bytes)}"
        )
        if result.starved:
            count, first = len(result.starved), result.starved[0]
            self.line(f"warning: no calibration token reached {count} experts' weights (first {first}): no data used")
        for part, times in result.outlying.items():
            error = result.errors[part]
            self.line(
                f"warning: {part} has an error of {error:.3g}, {times:.0f} times its neighbours'; give it more bits "
                f'or leave it out with a rule (match: "{part.removeprefix("block ")}.*")'
            )
        self.line(f"next: decoct evaluate {result.folder} --against BASE --text FILE")

    def measurement(self, found: "Measurement") -> None:
        """`decoct evaluate`."""
        table = _table("", "*base", "*this model") if found.against else _table("", "*this model")

        def row(name: str, value: str, base: str = "") -> None:
            table.add_row(*([name, base, value] if found.against else [name, value]))

        row(
            "perplexity",
            f"{found.perplexity:.3f}",
            "" if found.base_perplexity is None else f"{found.base_perplexity:.3f}",
        )
        if found.kl_mean is not None and found.kl_p99 is not None and found.kl_p999 is not None:
            row("KL mean (nats)", f"{found.kl_mean:.4f}")
            row("KL 99 %", f"{found.kl_p99:.3f}")
            row("KL 99.9 %", f"{found.kl_p999:.3f}")
        if found.top1_agreement is not None:
            row("top-1 agreement", f"{100 * found.top1_agreement:.2f} %")
        row("size", _size(found.nbytes), "" if found.base_nbytes is None else _size(found.base_nbytes))
        row(
            "bits per weight",
            f"{found.bits_per_weight:.2f}",
            "" if found.base_bits_per_weight is None else f"{found.base_bits_per_weight:.2f}",
        )
        if found.cache_bits is not None:
            row("bits per packed key or value", f"{found.cache_bits:.2f}")
        if found.cache_token_bytes is not None:
            row("keys and values per token", _size(found.cache_token_bytes))
        self._console.print(table)
        self.line(f"{found.protocol}; computed in {found.dtype}; {_duration(found.seconds)}")

    def export_report(self, found: "ExportReport") -> None:
        """What was written, what was checked, and what the other engine wrote."""
        self.line(f"wrote {found.path} ({found.format}, {_size(found.nbytes)})")
        for note in found.notes:
            self.line(f"  {note}")
        for check in found.checks:
            word = "warning" if check.warning else {True: "ok", False: "differs", None: "not checked"}[check.ok]
            self.line(f"  {check.name}: {word}; {check.detail}")
        if found.text is not None:
            self.line(f"  it goes on: {found.text!r}")

    def methods(self, found: "Sequence[MethodInfo]", presets: dict[str, str]) -> None:
        """`decoct methods`."""
        table = _table("method", "what it is", "settings and defaults")
        for method in found:
            settings = ", ".join(f"{key}: {_yaml(value)}" for key, value in method.settings.items())
            table.add_row(method.name, method.about, settings)
        self._console.print(table)
        table = _table("preset", "what it does")
        for name, about in presets.items():
            table.add_row(name, about)
        self._console.print(table)

    @contextmanager
    def progress(self) -> Iterator["Watch"]:
        """A line for every finished block, and a bar with the time left."""
        from decoct.engine.job import Watch

        columns = [
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}"),
        ]
        with Progress(*columns, console=self._console, transient=True, disable=not self._console.is_terminal) as bar:
            task = bar.add_task("compressing", total=None, left="")
            clock = _Clock()

            def event(found: "Event") -> None:
                left = clock.left(found)
                bar.update(task, total=found.total, completed=found.done, left=left)
                every = 1 if found.loss is None else -(-found.total // _STEP_LINES)
                if found.done % every == 0 or found.done == found.total:
                    self.line(_event_line(found, left))

            def planned(found: "Plan", number: int, count: int) -> None:
                clock.reset()
                bar.reset(task, left="")
                self.stage_plan(found, number, count)

            def began(what: str) -> None:
                clock.reset()
                bar.reset(task, left="")
                self.line(what)

            yield Watch(message=self.line, planned=planned, event=event, began=began)

    @contextmanager
    def counter(self, what: str) -> Iterator[Callable[[int, int], None]]:
        """A bar alone."""
        with Progress(console=self._console, transient=True, disable=not self._console.is_terminal) as bar:
            task = bar.add_task(what, total=None)
            yield lambda done, total: bar.update(task, total=total, completed=done)


class _Clock:
    """Time left, from the blocks that this process did itself."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._started, self._worked = time.monotonic(), 0

    def left(self, event: "Event") -> str:
        """Words for the time that the remaining parts will take."""
        if event.seconds < 0.05 and self._worked == 0:
            self._started = time.monotonic()  # restored parts cost nothing and predict nothing
            return ""
        self._worked += 1
        remaining = event.total - event.done
        each = (time.monotonic() - self._started) / self._worked
        return f"{_duration(each * remaining)} left" if remaining and self._worked > 1 else ""


def _event_line(event: "Event", left: str) -> str:
    error = "" if event.error is None else f"  error {event.error:.5f}"
    error += "" if event.loss is None else f"  loss {event.loss:.4f}"
    starved = f"  {len(event.starved)} experts' weights without data" if event.starved else ""
    return f"[{event.done:>3}/{event.total}] {event.part:<10}{error}  {event.seconds:6.1f} s  {left}{starved}".rstrip()


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(
            column.removeprefix("*"), justify="right" if column.startswith("*") else "left", overflow="fold"
        )
    return table


def _method(method: "AnyMethod") -> str:
    from decoct.recipe import method_settings

    ((name, settings),) = method_settings(method).items()
    if settings.get("n") is not None:
        settings = {**settings, "sparsity": f"{settings['n']}:{settings['m']}"}
    if "bits" in settings and settings["bits"] is None:
        settings = {**settings, "group_size": None}  # of codes that are not made
    shown = [f"{key} {_yaml(settings[key])}" for key in _SHOWN if _is_set(settings.get(key))]
    return f"{name} ({', '.join(shown)})" if shown else name


def _is_set(value: object) -> bool:
    return value is not None and value is not False  # a window of 0 is


def _size(nbytes: float) -> str:
    from decoct.engine.budget import format_size

    return format_size(nbytes)


def _count(number: float) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return str(int(number))


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _yaml(value: object) -> str:
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)

"""Training as a stage of a recipe: planned, run, resumed, written."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from decoct.engine.plan import Group, Plan, StepRules, make_plan
from decoct.engine.rules import Rule
from decoct.engine.stages import Before, OwnStage, StageRun
from decoct.engine.stream import Event
from decoct.engine.tune import CHECKPOINT
from decoct.engine.write import contents, shard_name, write_shard
from decoct.methods import name_of
from decoct.methods.training import TrainingMethod
from decoct.training.inside import Insides, Seen
from decoct.training.keep import check_policy, policy_of
from decoct.training.lessons import check_lessons
from decoct.training.loop import Trainer, Training, read_progress
from decoct.training.network import Student, Teacher
from decoct.training.objective import objective_of
from decoct.training.plan import numbers_of, plan_training, rounds_inputs
from decoct.training.processes import said_by_first
from decoct.training.teachers import kept_teacher, predicting, settled, teach_of, teachers_of
from decoct.training.text import TEACHER, length_of, read_text, source_of
from decoct.training.views.choose import Becoming, changes_form, vectors_of, views_of

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}


@dataclass(frozen=True)
class TrainStage(OwnStage):
    """Trains what weights store, in the form in which they are.

    Attributes:
        method: settings.
        description: the stage as the recipe spells it.
    """

    method: TrainingMethod
    description: dict[str, Any]

    @override
    def plan(self, before: Before) -> Plan:
        objective = objective_of(self.method.loss)
        check_lessons(self.method, objective, rounds_inputs=rounds_inputs(before))
        taught = objective.needs_teacher or source_of(self.method, before.data) == TEACHER
        teachers = teachers_of(self.method, before.original) if taught else ()
        numbers = numbers_of(before, self.method)
        policy = policy_of(self.method, before.model)
        check_policy(policy, objective, before.model)
        if objective.inner:
            insides, length = Insides(objective, before.model, teachers[0]), length_of(self.method, before.data)
            more = insides.nbytes(before.model, self.method.batch_size * length, length)
            numbers = replace(numbers, held=numbers.held + more)
        groups = (Group("all", len(before.model.slots()), numbers.trained, (self.method,)),)
        found = replace(plan_training(before, self.method, teachers, numbers, groups), kind=name_of(self.method))
        if not self.steps():
            return found
        # A pass that rounds to nearest leaves the same form.
        form = make_plan(before.model, self.steps(), before.data, before.budget, found.dtype, before.passes)
        return replace(
            found, steps=form.steps, output_bytes=form.output_bytes, reals=form.reals, described=form.described
        )

    @override
    def steps(self) -> tuple[StepRules, ...]:
        if changes_form(self.method):
            return ((Rule(("*",), Becoming(method=self.method)),),)
        return ()

    @override
    def run(self, given: StageRun) -> dict[str, Any]:
        parts = list(contents(given.model))
        student = None
        needed = any(given.journal.finished(part) is None for part, _, _ in parts)
        said_by_first([needed, str(given.plan.dtype).removeprefix("torch."), str(given.folder)])
        if needed:
            student = self._trained(given)
        else:
            self._retell(given)
        transposed = {name for name, slot in given.model.slots().items() if slot.transposed}
        for number, (part, slots, others) in enumerate(parts):
            started = time.perf_counter()
            if given.journal.finished(part) is None:
                assert student is not None
                shard = given.folder / shard_name(number, len(parts))
                weights = {name: student.views[name].weight() for name in slots}
                vectors = {
                    name: student.vectors[name].tensor() if name in student.vectors else given.model.tensor(name)
                    for name in others
                }
                nbytes = write_shard(shard, weights, vectors, transposed)
                given.journal.finish(part, shard, error=None, nbytes=nbytes, starved=[])
            nbytes = given.journal.parts[part]["nbytes"]
            given.on_event(Event(part, number + 1, len(parts), None, time.perf_counter() - started, nbytes))
        progress = read_progress(given.folder / CHECKPOINT)
        return {"training": {"steps": len(progress.losses), "text": progress.text, "held_out": progress.looks}}

    def help(self, given: StageRun) -> None:
        """What a process does that is not the first: its share of every step, if any is left."""
        needed, dtype, folder = said_by_first([None, None, None])
        if needed:
            plan = replace(given.plan, dtype=_DTYPES[dtype])
            self._trained(replace(given, plan=plan, folder=Path(folder)))

    def _trained(self, given: StageRun) -> Student:
        """The model as it is in the end."""
        method, objective = self.method, objective_of(self.method.loss)
        model, dtype = given.model, given.plan.dtype
        writes = source_of(method, given.data) == TEACHER
        teachers = teachers_of(method, given.original) if objective.needs_teacher or writes else ()
        text = read_text(method, given.data, model, teachers[0] if teachers else None, given.message)
        insides = Insides(objective, model, teachers[0]) if objective.inner else None
        teach: Callable[[Tensor], Seen] | None = None
        if insides is not None:
            teach = Teacher(teachers[0], dtype, insides.teacher_wants).seen
        elif objective.needs_teacher:
            teach = predicting(
                kept_teacher(method, teachers, model, dtype, text.all, given.folder)
                if method.keep_teacher
                else teach_of(method, teachers, model, dtype)
            )
        views, vectors = views_of(model, method), vectors_of(model, method)
        student = Student(
            model,
            views,
            vectors,
            dtype,
            recompute=not given.plan.in_memory,
            insides=insides,
            policy=policy_of(method, model),
        )
        objective = settled(objective, teach, text, method.batch_size)
        todo = Training(method, student, teach, objective, text, given.folder, given.on_event, given.message)
        Trainer(todo).run()
        return student

    def _retell(self, given: StageRun) -> None:
        """Steps of an earlier process, for the summary."""
        progress = read_progress(given.folder / CHECKPOINT)
        for step, loss in enumerate(progress.losses):
            given.on_event(Event(f"step {step + 1}", step + 1, progress.total, None, 0.0, 0, loss=loss))

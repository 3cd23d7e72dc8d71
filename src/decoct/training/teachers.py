"""Which models teach, whether they can, and how they become one teacher."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from decoct.engine.data import load_tokenizer
from decoct.losses import CAKLD, ULD, CachedKL, PredictionLoss, confidence_of
from decoct.methods.training import TrainingMethod
from decoct.model import Model, open_model
from decoct.teachers import CachedTeacher, OtherTokenizer, Several, Teach, identity, same_tokenizer, write_cache
from decoct.training.inside import Seen
from decoct.training.network import Teacher
from decoct.training.objective import Objective, objective_of
from decoct.training.text import Text

_LOOKED_AT = 64  # sequences, to see how sure a teacher is
_SURE = 1e-3  # least confidence, and least doubt

CACHE = "teacher"
"""The folder, in a stage's, where a teacher's likeliest tokens are kept."""


def teachers_of(method: TrainingMethod, original: Model) -> tuple[Model, ...]:
    """The models that are imitated: those that the settings name, else the one that the recipe begins with.

    Raises:
        ValueError: there is no such model, it is compressed itself and was not named, or reads other tokens, and the
            loss is not made for that.
    """
    objective = objective_of(method.loss)
    losses = [type(loss) for loss in objective.predicting]
    if (CachedKL in losses) != (method.keep_teacher > 0):
        raise ValueError("the loss cached_kl and the setting keep_teacher (tokens to keep, such as 64) need each other")
    if method.teacher is None:
        if original.described:
            raise ValueError(
                f"{original.source.label} is compressed already, so it cannot teach itself; name the model that it was "
                "made from: --set teacher=BASE"
            )
        return (original,)
    if objective.inner and (method.keep_teacher or isinstance(method.teacher, tuple)):
        raise ValueError("losses on inner states need one teacher, which runs in every step (keep_teacher: 0)")
    names = (method.teacher,) if isinstance(method.teacher, str) else method.teacher
    found = tuple(open_model(name) for name in names)
    for teacher in found:
        if not _reads_alike(original, teacher) and (len(found) > 1 or losses != [ULD] or objective.inner):
            raise ValueError(
                f"{teacher.source.label} has another tokenizer than {original.source.label}, so their predictions "
                "cannot be compared; take a teacher of the same family, or set loss=uld"
            )
    return found


def teach_of(method: TrainingMethod, teachers: Sequence[Model], student: Model, dtype: torch.dtype) -> Teach:
    """One teacher, its models unpacked in memory."""
    if len(teachers) > 1:
        members = tuple(Teacher(each, dtype).targets for each in teachers)
        weights = method.teacher_weights or (1.0,) * len(members)
        return Several(members, None if method.teachers == "surest" else weights)
    teach = Teacher(teachers[0], dtype).targets
    if _reads_alike(student, teachers[0]):
        return teach
    return OtherTokenizer(teach, load_tokenizer(student), load_tokenizer(teachers[0]))


def predicting(teach: Teach) -> Callable[[Int[Tensor, "batch seq"]], Seen]:
    """A teacher of whom nothing but predictions is wanted."""
    return lambda tokens: Seen(teach(tokens))


def settled(
    objective: Objective, teach: Callable[[Int[Tensor, "batch seq"]], Seen] | None, text: Text, size: int
) -> Objective:
    """The same objective with what has to be found before the first step: how sure the teacher is of the text.

    Args:
        objective: as the recipe names it.
        teach: the teacher.
        text: to be learned from; its first sequences are looked at.
        size: sequences that are run together.
    """
    wanting = any(isinstance(loss, CAKLD) and loss.confidence is None for loss in objective.predicting)
    if not wanting or teach is None:
        return objective
    batches = [text.batch(number, size) for number in range(max(1, min(_LOOKED_AT, len(text.train)) // size))]
    found = sum(confidence_of(teach(tokens).predictions, batch) for tokens, batch in batches) / len(batches)
    sure = min(max(found, _SURE), 1 - _SURE)

    def with_it(loss: PredictionLoss) -> PredictionLoss:
        return replace(loss, confidence=sure) if isinstance(loss, CAKLD) and loss.confidence is None else loss

    terms = tuple((weight, with_it(loss)) for weight, loss in objective.terms)
    exits = tuple((weight, replace(loss, each=with_it(loss.each))) for weight, loss in objective.exits)
    return replace(objective, terms=terms, exits=exits)


def kept_teacher(
    method: TrainingMethod,
    teachers: Sequence[Model],
    student: Model,
    dtype: torch.dtype,
    tokens: Int[Tensor, "sequences length"],
    folder: Path,
) -> Teach:
    """A teacher that ran once over the text, and whose likeliest tokens are read from disk; or goes on doing so.

    Raises:
        ValueError: the cache is of another text or teacher, or the disk is too full.
    """
    who = "|".join([identity(each, dtype) for each in teachers] + [method.teachers, str(method.teacher_weights)])
    write_cache(folder / CACHE, teach_of(method, teachers, student, dtype), who, tokens, method.keep_teacher)
    return CachedTeacher(folder / CACHE, who, tokens)


def _reads_alike(student: Model, teacher: Model) -> bool:
    """Whether two models have the same vocabulary and tokenizer."""
    if student is teacher:
        return True
    mine, theirs = (model.shape(model.end_slots[-1].name)[0] for model in (student, teacher))
    return mine == theirs and same_tokenizer(load_tokenizer(student), load_tokenizer(teacher))

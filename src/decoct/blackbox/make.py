"""From prompts to a data set: ask, filter, write."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from decoct.blackbox.asking import Asker
from decoct.blackbox.client import Question
from decoct.blackbox.filters import Filter, similarity
from decoct.blackbox.tasks import Record, Task
from decoct.store.files import atomic_path

_TOO_ALIKE = 0.7  # ROUGE-L of two instructions, from arXiv 2212.10560
_SHOWN = 4  # instructions that new ones are modelled on


@dataclass(frozen=True, slots=True)
class Asked:
    """What came of it.

    Attributes:
        path: the data set.
        records: lines in it.
        prompts: that were to be asked.
        unanswered: of them, because a limit came before.
        taken_out: answers, by reason.
        calls: that were made; the other answers were in the cache.
        tokens_in: of all prompts in the cache, as paid.
        tokens_out: of all answers there.
        cost: of both, at the prices given.
    """

    path: str
    records: int
    prompts: int
    unanswered: int
    taken_out: dict[str, int]
    calls: int
    tokens_in: int
    tokens_out: int
    cost: float


def make_records(
    asker: Asker,
    task: Task,
    prompts: Sequence[str],
    out: Path,
    keep: Filter,
    *,
    answers: int = 1,
    parallel: int = 4,
    on_progress: Callable[[int, int], None] = lambda *_: None,
) -> Asked:
    """Ask for answers to prompts, and write those that pass the filter as JSON lines.

    The file is whole or absent; asked again with the same arguments, it comes from the cache.

    Args:
        asker: whom to ask.
        task: what to ask, and what to make of it.
        prompts: in the order in which they are written.
        out: the file.
        keep: the filter.
        answers: to each prompt.
        parallel: calls at a time.
        on_progress: told of answers, and of all.

    Raises:
        ValueError: as `Asker.ask_all`, or nothing is left to write.
    """
    wanted = [(prompt, number) for prompt in prompts for number in range(answers)]
    found = asker.ask_all([task.question(prompt, number) for prompt, number in wanted], parallel, on_progress)
    records: list[Record] = []
    for (prompt, number), answer in zip(wanted, found, strict=True):
        if answer is not None and keep.passes(prompt, answer):
            made = task.records(prompt, answer, number)
            if made is None:
                keep.taken_out["another form than asked for"] += 1
            else:
                records += made
    unanswered = sum(answer is None for answer in found)
    if not records:
        raise ValueError(_nothing(len(wanted), unanswered, keep))
    with atomic_path(out) as partial:
        partial.write_text("".join(json.dumps(each, ensure_ascii=False) + "\n" for each in records), encoding="utf-8")
    return Asked(
        str(out), len(records), len(prompts), unanswered, dict(keep.taken_out), asker.num_calls, asker.tokens_in,
        asker.tokens_out, asker.cost,
    )  # fmt: skip


def expand_prompts(asker: Asker, prompts: Sequence[str], count: int) -> list[str]:
    """More instructions like the given ones (Self-Instruct, arXiv 2212.10560): `count` of them in all.

    Each call shows a few that there are and asks for new ones; what is too much like another is left out. Stops at a
    limit, or where nothing new comes any more.

    Raises:
        ValueError: as `Asker.ask`.
    """
    found, rounds = list(prompts), 0
    while len(found) < count and rounds < 2 * count:
        shown = [found[(rounds * _SHOWN + i) % len(found)] for i in range(min(_SHOWN, len(found)))]
        listed = "\n".join(f"- {each}" for each in shown)
        text = (
            f'Write 8 new tasks like these, different from each other and from them, one a line after "- ":\n{listed}'
        )
        (answer,) = asker.ask_all([Question((("user", text),), 512, 1.0, rounds)], 1)
        if answer is None:
            break
        lines = [line.strip()[2:].strip() for line in answer.text.splitlines() if line.strip().startswith("- ")]
        for line in lines:
            if line and len(found) < count and all(similarity(line, other) < _TOO_ALIKE for other in found):
                found.append(line)
        rounds += 1
    return found


def _nothing(wanted: int, unanswered: int, keep: Filter) -> str:
    if unanswered == wanted:
        return "the limit was reached before the first answer; allow more tokens or cost"
    reasons = ", ".join(f"{count} {reason}" for reason, count in keep.taken_out.most_common())
    return f"none of {wanted - unanswered} answers is worth learning from ({reasons}); change the prompts or the filter"

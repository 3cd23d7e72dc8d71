"""`decoct ask`: a model that is only to be asked writes a data set to train on."""

import os
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from decoct.commands.common import JsonOption, answer, errors
from decoct.console import Console

if TYPE_CHECKING:
    from decoct.blackbox import Asked
    from decoct.blackbox.tasks import Task


class Kind(StrEnum):
    """What is asked for."""

    INSTRUCT = "instruct"
    STEPS = "steps"
    IN_CONTEXT = "in_context"


def ask(
    url: Annotated[str, typer.Argument(metavar="URL", help="An OpenAI-compatible URL, e.g. http://localhost:8000/v1.")],
    model: Annotated[str, typer.Option("--model", help="The model's name there.")],
    prompts: Annotated[Path, typer.Option("--prompts", help="One prompt a line, or JSON lines with prompt.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The data set: JSON lines with prompt and response.")],
    kind: Annotated[
        Kind, typer.Option("--kind", help="Answers; rationale and label (steps); answers after examples (in_context).")
    ] = Kind.INSTRUCT,
    examples: Annotated[
        Path | None, typer.Option("--examples", help="Solved prompts, JSON lines, for steps and in_context.")
    ] = None,
    num_examples: Annotated[
        int, typer.Option("--num-examples", min=1, help="Shown with each prompt (in_context).")
    ] = 4,
    drop_examples: Annotated[
        bool, typer.Option("--drop-examples", help="The student does not see them (in_context).")
    ] = False,
    expand: Annotated[
        int | None, typer.Option("--expand", min=1, help="Have the model write more prompts, to so many in all.")
    ] = None,
    answers: Annotated[int, typer.Option("--answers", min=1, help="To each prompt.")] = 1,
    answer_tokens: Annotated[int, typer.Option("--answer-tokens", min=1, help="Most tokens of an answer.")] = 512,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0)] = 0.7,
    min_characters: Annotated[int, typer.Option("--min-characters", min=1, help="Of an answer that is kept.")] = 1,
    refusals: Annotated[bool, typer.Option("--refusals", help="Keep answers that refuse.")] = False,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", min=1, help="Stop before more are used, earlier runs counted.")
    ] = None,
    max_cost: Annotated[
        float | None, typer.Option("--max-cost", min=0.0, help="Stop before it costs more, earlier runs counted.")
    ] = None,
    price_in: Annotated[float, typer.Option("--price-in", min=0.0, help="Of a million tokens of prompts.")] = 0.0,
    price_out: Annotated[float, typer.Option("--price-out", min=0.0, help="Of a million tokens of answers.")] = 0.0,
    cache: Annotated[
        Path | None, typer.Option("--cache", metavar="FOLDER", help="Where answers are kept (OUT.cache).")
    ] = None,
    key_from: Annotated[
        str, typer.Option("--key-from", metavar="VARIABLE", help="The environment variable with the API key.")
    ] = "OPENAI_API_KEY",
    parallel: Annotated[int, typer.Option("--parallel", min=1, help="Calls at a time.")] = 4,
    json: JsonOption = False,
) -> None:
    """Have a model behind a URL write a data set. Interrupted, the same command goes on; nothing is asked twice."""
    with errors(json=json, resumable=True):
        from decoct.blackbox import Asker, Limit, Server, make_records, read_prompts
        from decoct.blackbox.filters import Filter
        from decoct.blackbox.make import expand_prompts

        task = _task(kind, examples, num_examples, answer_tokens, temperature, drop=drop_examples)
        wanted = read_prompts(prompts)
        limit = Limit(max_tokens=max_tokens, max_cost=max_cost, price_in=price_in, price_out=price_out)
        server = Server(url, model, os.environ.get(key_from))
        folder = cache or out.with_name(out.name + ".cache")
        keep = Filter(min_characters=min_characters, refusals=refusals)
        with Asker(server, folder, limit) as asker, Console.for_stderr().counter("asking") as on_progress:
            wanted = wanted if expand is None else expand_prompts(asker, wanted, expand)
            found = make_records(
                asker, task, wanted, out, keep, answers=answers, parallel=parallel, on_progress=on_progress
            )
        answer(json=json, value=asdict(found), show=lambda console: _show(console, found))


def _task(
    kind: Kind, examples: Path | None, num_examples: int, max_tokens: int, temperature: float, *, drop: bool
) -> "Task":
    from decoct.blackbox import InContext, Instruct, StepByStep, read_examples

    shown = read_examples(examples) if examples is not None else ()
    if kind is Kind.STEPS:
        return StepByStep(max_tokens=max_tokens, temperature=temperature, examples=shown)
    if kind is Kind.IN_CONTEXT:
        if examples is None:
            raise typer.BadParameter("in_context shows solved prompts: give --examples FILE", param_hint="--examples")
        return InContext(
            max_tokens=max_tokens, temperature=temperature, examples=shown, num_examples=num_examples,
            keep_examples=not drop,
        )  # fmt: skip
    if examples is not None:
        raise typer.BadParameter("examples are for --kind steps and in_context", param_hint="--examples")
    return Instruct(max_tokens=max_tokens, temperature=temperature)


def _show(console: Console, found: "Asked") -> None:
    console.line(f"wrote {found.path}: {found.records} records from {found.prompts} prompts")
    if found.taken_out:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(found.taken_out.items()))
        console.line(f"left out: {reasons}")
    if found.unanswered:
        console.line(f"{found.unanswered} not asked: the limit was reached; raise it and run the same command again")
    cost = f", cost {found.cost:.2f}" if found.cost else ""
    console.line(f"{found.calls} calls now; {found.tokens_in} + {found.tokens_out} tokens in all{cost}")

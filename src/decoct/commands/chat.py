"""`decoct chat`: a conversation on the terminal."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from decoct.commands.common import ModelArgument, errors
from decoct.commands.generate import spent, write_piece
from decoct.commands.options import (
    ContextOption,
    EngineOption,
    MaxTokensOption,
    MinPOption,
    PenaltyOption,
    SeedOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
)
from decoct.console import Console

if TYPE_CHECKING:
    from decoct.serving import Engine, Options


def chat(
    model: ModelArgument,
    system: Annotated[str | None, typer.Option("--system", help="What the model is told first.")] = None,
    max_tokens: MaxTokensOption = 512,
    engine: EngineOption = "decoct",
    temperature: TemperatureOption = 0.7,
    top_k: TopKOption = 0,
    top_p: TopPOption = 0.95,
    min_p: MinPOption = 0.0,
    repetition_penalty: PenaltyOption = 1.0,
    seed: SeedOption = None,
    context: ContextOption = None,
) -> None:
    """Talk with a model that has a chat template. /reset forgets, /exit or Ctrl-D ends."""
    with errors(json=False):
        from decoct.runtime.sampling import Sampling
        from decoct.serving import Options, open_engine
        from decoct.serving.text import no_template

        sampling = Sampling(
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty,
            seed=seed,
        )  # fmt: skip
        opened = open_engine(engine, model, context=context)
        try:
            if not opened.chats:
                raise ValueError(no_template(model))
            _talk(opened, Options(max_tokens=max_tokens, sampling=sampling), system)
        finally:
            opened.close()


def _talk(engine: "Engine", options: "Options", system: str | None) -> None:
    console = Console.for_stderr()
    console.line(f"{engine.about}; /reset forgets, /exit ends")
    told = [{"role": "system", "content": system}] if system else []
    messages = list(told)
    while True:
        line = _read()
        if line is None or line == "/exit":
            return
        if line == "/reset":
            messages = list(told)
        elif line:
            messages.append({"role": "user", "content": line})
            try:
                (found,) = engine.generate([messages], options, write_piece)
            except ValueError as error:  # most often the context is full: the conversation can be begun anew
                console.line(f"error: {error}; /reset forgets the conversation")
                if len(messages) == len(told) + 1:
                    raise
                messages.pop()
                continue
            messages.append({"role": "assistant", "content": found.text})
            sys.stdout.write("\n")
            console.line(spent(found, engine.name))


def _read() -> str | None:
    """A line of the user's; None: there are no more."""
    if sys.stdin.isatty():
        sys.stderr.write("> ")
        sys.stderr.flush()
    line = sys.stdin.readline()
    return line.strip() if line else None

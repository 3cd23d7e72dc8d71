"""`decoct generate`: go on with a text."""

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from decoct.commands.common import JsonOption, ModelArgument, answer, errors
from decoct.commands.options import (
    ContextOption,
    EngineOption,
    MaxTokensOption,
    MinPOption,
    PenaltyOption,
    SeedOption,
    StopOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
)
from decoct.console import Console

if TYPE_CHECKING:
    from decoct.serving import Generation
    from decoct.serving.engine import Piece


def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Option("--prompt", help="Text to go on with; - reads it from standard input.")],
    max_tokens: MaxTokensOption = 128,
    engine: EngineOption = "decoct",
    temperature: TemperatureOption = 0.0,
    top_k: TopKOption = 0,
    top_p: TopPOption = 1.0,
    min_p: MinPOption = 0.0,
    repetition_penalty: PenaltyOption = 1.0,
    seed: SeedOption = None,
    stop: StopOption = None,
    context: ContextOption = None,
    json: JsonOption = False,
) -> None:
    """Go on with a text. What is written comes as it is written; what it took comes on stderr."""
    with errors(json=json):
        from decoct.runtime.sampling import Sampling
        from decoct.serving import Options, open_engine

        sampling = Sampling(
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty,
            seed=seed,
        )  # fmt: skip
        options = Options(max_tokens=max_tokens, stop=tuple(stop or ()), sampling=sampling)
        opened = open_engine(engine, model, context=context)
        try:
            text = sys.stdin.read() if prompt == "-" else prompt
            (found,) = opened.generate([text], options, _nothing if json else write_piece)
        finally:
            opened.close()
        value = {**asdict(found), "engine": engine, "about": opened.about}

        def show(_: Console) -> None:
            sys.stdout.write("\n")
            Console.for_stderr().line(spent(found, opened.about))

        answer(json=json, value=value, show=show)


def write_piece(which: int, piece: "Piece") -> None:
    """Show text as it comes."""
    del which
    sys.stdout.write(piece.text)
    sys.stdout.flush()


def spent(found: "Generation", about: str) -> str:
    """What an answer took, in a line."""
    rest = found.seconds - found.first_token_seconds
    rate = f", {(found.tokens - 1) / rest:.1f} tokens/s" if found.tokens > 1 and rest > 0 else ""
    return f"{found.tokens} tokens in {found.seconds:.1f} s{rate}, ended by {found.finish}; {about}"


def _nothing(which: int, piece: "Piece") -> None:
    """Nothing is shown while JSON is wanted."""

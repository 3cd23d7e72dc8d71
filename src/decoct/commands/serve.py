"""`decoct serve`: a model for programs that speak the OpenAI API."""

from pathlib import Path
from typing import Annotated

import typer

from decoct.commands.common import ModelArgument, errors
from decoct.commands.options import ContextOption, EngineOption
from decoct.console import Console


def serve(
    model: ModelArgument,
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: a free one.")] = 8000,
    host: Annotated[str, typer.Option("--host", help="0.0.0.0 to be seen from other machines.")] = "127.0.0.1",
    name: Annotated[
        str | None, typer.Option("--name", help="As clients ask for the model (the folder's name).")
    ] = None,
    engine: EngineOption = "decoct",
    context: ContextOption = None,
    seats: Annotated[int, typer.Option("--seats", min=1, help="Sequences that are written at the same time.")] = 4,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", min=1, help="The most that a client gets.")] = None,
    max_waiting: Annotated[int, typer.Option("--max-waiting", min=0, help="Requests that may wait for a seat.")] = 64,
    timeout: Annotated[float, typer.Option("--timeout", min=0.1, help="Seconds until a request is given up.")] = 600.0,
) -> None:
    """Serve a model over HTTP: /v1/chat/completions, /v1/completions, /v1/models, /health, /metrics."""
    with errors(json=False):
        from decoct.serving.server import open_server
        from decoct.serving.worker import Limits

        limits = Limits(max_tokens=max_tokens, max_waiting=max_waiting, seconds=timeout)
        server = open_server(
            model, engine=engine, context=context, num_seats=seats, limits=limits, host=host, port=port,
            name=name or Path(model).name,
        )  # fmt: skip
        Console.for_stderr().line(f"{server.name} at {server.address}/v1 ({server.about}); Ctrl-C ends")
        server.run()

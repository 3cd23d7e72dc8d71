"""What all commands share: the model argument, `--json`, one answer on stdout, one line for an error."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from decoct.console import Console, fail, json_text

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="A model folder, a .gguf file, or a hub id.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]


def answer(*, json: bool, value: object, show: Callable[[Console], None]) -> None:
    """Print one JSON object, or what `show` makes of a console."""
    if json:
        sys.stdout.write(json_text(value) + "\n")
    else:
        show(Console.for_stdout())


@contextmanager
def errors(*, json: bool, resumable: bool = False) -> Iterator[None]:
    """Turn what a user can mend into one line; 1: it failed, 2: it was asked for wrongly."""
    again = "; nothing finished is lost: run the same command again to go on" if resumable else ""
    try:
        yield
    except typer.BadParameter as error:
        if not json:
            raise  # Typer adds how the command is used
        fail(error.format_message(), 2, json=True)
    except KeyboardInterrupt:
        fail(f"stopped{again}", 1, json=json)
    except MemoryError:
        fail(f"out of memory; give a smaller --memory limit or close other programs{again}", 1, json=json)
    except OSError as error:
        fail(f"{error.strerror or error}: {error.filename or ''}{again}", 1, json=json)
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        fail(f"out of memory; give a smaller --memory limit or close other programs{again}", 1, json=json)
    except ValueError as error:
        from decoct.recipe import RecipeError

        fail(str(error), 2 if isinstance(error, RecipeError) else 1, json=json)

"""`decoct imatrix`: what llama.cpp's quantizer wants to know of a model's inputs."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from decoct.commands.common import JsonOption, ModelArgument, answer, errors
from decoct.console import Console, fail

if TYPE_CHECKING:
    from decoct.exporters.imatrix import ImportanceMatrix


def imatrix(
    model: ModelArgument,
    data: Annotated[str, typer.Option("--data", help="A text file, a hub dataset, or self: the model writes it.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The file, e.g. imatrix.gguf.")],
    sequences: Annotated[int, typer.Option("--sequences", min=1, help="How many pieces of the text.")] = 128,
    length: Annotated[int, typer.Option("--length", min=2, help="Tokens in each.")] = 512,
    json: JsonOption = False,
) -> None:
    """Write an importance matrix for llama.cpp: mean squared inputs of every matrix, one block in memory at a time."""
    with errors(json=json):
        from decoct.engine.data import Data
        from decoct.exporters.imatrix import make_imatrix
        from decoct.model import open_model

        text = Data(source=data, num_sequences=sequences, sequence_length=length)
        with Console.for_stderr().counter("blocks") as on_progress:
            found = make_imatrix(open_model(model), text, out, on_progress=on_progress)
        value = {**asdict(found), "path": str(found.path)}
        answer(json=json, value=value, show=lambda console: _show(console, found))
        if not found.check.ok:
            fail(f"{out} was written, but differs: {found.check.detail}", 1, json=False)


def _show(console: Console, found: "ImportanceMatrix") -> None:
    console.line(f"wrote {found.path} ({found.matrices} matrices, {found.tokens} tokens)")
    console.line(f"  {found.check.name}: {'ok' if found.check.ok else 'differs'}; {found.check.detail}")
    if found.starved:
        console.line(f"  {len(found.starved)} matrices that no token reached are left out, first {found.starved[0]}")
    console.line(f"next: llama-quantize --imatrix {found.path} model-f16.gguf model-q4_k_m.gguf q4_k_m")

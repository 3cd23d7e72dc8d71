"""What every graph's export checks: each tensor beside ours, and the words and logits of the engine that runs it."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from decoct.engine.data import load_tokenizer
from decoct.exporters.compare import (
    NUM_NEW,
    Written,
    compare,
    dense_weights,
    enough_memory,
    our_logits,
    prompt_tokens,
)
from decoct.exporters.held import Codes, Held
from decoct.exporters.report import Check, size_of
from decoct.model import Model

_SAME = 1e-6  # relative: products of float32 numbers rounded once


class GraphDecoder(Protocol):
    """An engine that has loaded a folder."""

    def advance(self, seat: int, tokens: Sequence[int]) -> Float[Tensor, " vocab"]:
        """Take tokens in; gives the logits after the last one."""


class GraphReader(Protocol):
    """What was written, as another package than ours reads it."""

    def floats(self, name: str) -> Tensor:
        """A tensor that is no code, in float32."""

    def codes(self, name: str, held: Held) -> Codes:
        """A matrix of codes."""


def values_check(model: Model, held: dict[str, Held], reader: GraphReader) -> Check:
    """Each matrix, norm and bias beside ours: they have to be the same."""
    worst, worst_name, count = 0.0, "", 0
    for name, ours in _ours(model, held):
        theirs = matrix(model, held, reader, name) if name in held else reader.floats(name).reshape(ours.shape)
        error = float((theirs - ours).norm() / ours.norm().clamp(min=torch.finfo(torch.float32).tiny))
        count += 1
        if error >= worst:
            worst, worst_name = error, name
    return Check("values", worst <= _SAME, f"{count} tensors, largest relative error {worst:.1e} ({worst_name})")


def matrix(model: Model, held: dict[str, Held], reader: GraphReader, name: str) -> Float[Tensor, "out in"]:
    """A slot's matrix in float32, from what lies in the folder."""
    form, cols = held[name], model.shape(name)[1]
    return reader.floats(name) if form.bits is None else reader.codes(name, form).unpack(cols)


def run_checks(
    model: Model,
    held: dict[str, Held],
    reader: GraphReader,
    out: Path,
    start: Callable[[int], tuple[str, GraphDecoder]],
    *,
    nearly: bool,
) -> tuple[list[Check], str | None]:
    """Whether the engine loads the folder, its logits beside ours, and what it wrote.

    Args:
        model: what was written.
        held: how.
        reader: of the folder.
        out: the folder.
        start: loads it for so many tokens; gives the engine's name too.
        nearly: the engine's arithmetic is known to differ from ours.
    """
    refused = enough_memory(2 * size_of(out), out)
    if refused is not None:
        return [refused], None
    prompt = prompt_tokens(model)
    try:
        name, decoder = start(len(prompt) + NUM_NEW)
        written = _write(decoder, prompt)
    except ValueError as error:
        return [Check("load", ok=False, detail=str(error))], None
    tokens = torch.tensor([*written.prompt, *written.tokens])
    exact = all(form.exact for form in held.values())
    ours = our_logits(model, tokens, None if exact else dense_weights(lambda slot: matrix(model, held, reader, slot)))
    checks = [Check("load", ok=True, detail=name), compare("logits", ours, written, nearly=nearly)]
    return checks, _text(model, written.tokens)


def _ours(model: Model, held: dict[str, Held]) -> Iterator[tuple[str, Tensor]]:
    for name in held:
        yield name, model.weight(name).unpack(torch.float32)
    for block in (None, *range(model.num_blocks)):
        yield from ((name, model.tensor(name).float()) for name in model.others(block))


def _write(decoder: GraphDecoder, prompt: list[int]) -> Written:
    """Go on with the likeliest token, through the cache."""
    tokens, logprobs, fed = list(prompt), [], list(prompt)
    for _ in range(NUM_NEW):
        row = decoder.advance(0, fed).log_softmax(-1)
        logprobs.append({i: value for i, value in enumerate(row.tolist()) if value > -20})
        fed = [int(row.argmax())]
        tokens += fed
    return Written(prompt, tokens[len(prompt) :], logprobs, "")


def _text(model: Model, tokens: list[int]) -> str | None:
    """Of tokens; None: there is no tokenizer."""
    try:
        return str(load_tokenizer(model).decode(tokens))
    except ValueError:
        return None

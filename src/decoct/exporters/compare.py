"""Another engine's probabilities beside ours, on tokens that the engine chose itself."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from decoct.engine.data import load_tokenizer
from decoct.engine.runner import Runner
from decoct.exporters.report import Check
from decoct.model import Model
from decoct.weights import Dense, Weight

PROMPT = "Once upon a time, in a small town by the sea, there was"
NUM_NEW = 32
_SAME_KL = 0.02  # nats; engines that round inputs of their products to 8 bits stay well below it
_NEARLY = 0.1  # nats: where an engine's arithmetic is known to differ


@dataclass(frozen=True, slots=True)
class Written:
    """What an engine made of a prompt.

    Attributes:
        prompt: tokens that it was given.
        tokens: that it went on with, the likeliest each time.
        logprobs: of each of these, log-probabilities of the likeliest tokens (or all), by token.
        text: of the tokens.
    """

    prompt: list[int]
    tokens: list[int]
    logprobs: list[dict[int, float]]
    text: str


@torch.no_grad()
def our_logits(
    model: Model, tokens: Int[Tensor, " length"], weight: Callable[[str], Weight] | None = None
) -> Float[Tensor, "length vocab"]:
    """Logits in float32, one block in memory at a time.

    Args:
        model: whose forward pass.
        tokens: one sequence.
        weight: another source of the slots' weights, by full name; None: the model's own.
    """
    read = weight or model.weight
    runner = Runner(model, torch.float32)
    hidden = runner.embed(tokens.unsqueeze(0), read(model.family.embed).unpack(torch.float32))
    for block in range(model.num_blocks):
        names = [model.prefix(block) + slot.name for slot in model.block_slots]
        hidden = runner.run(block, runner.lay_out(block, {name: read(name) for name in names}), hidden)
    head = read(model.family.embed if model.tied else model.family.head)
    return runner.logits(hidden, head.unpack(torch.float32))[0]


def prompt_tokens(model: Model) -> list[int]:
    """The prompt in the model's tokens; where there is no tokenizer, a few tokens from all over the vocabulary."""
    rows = model.shape(model.family.embed)[0]
    bos = model.config.get("bos_token_id")
    start = [int(bos)] if isinstance(bos, int) else []
    try:
        found = list(load_tokenizer(model)(PROMPT, add_special_tokens=False)["input_ids"])
    except ValueError:
        found = []
    found = [token for token in found if token < rows] or [(7 * k + 3) % rows for k in range(12)]
    most = (model.max_length or 2048) - NUM_NEW
    return (start + found)[: max(1, most)]


def compare(name: str, ours: Float[Tensor, "length vocab"], written: Written, *, nearly: bool = False) -> Check:
    """Their probabilities beside ours, wherever the engine chose a token.

    Args:
        name: of the check.
        ours: our logits on the prompt and the tokens.
        written: by the engine.
        nearly: its arithmetic is known to differ from ours.
    """
    start, count = len(written.prompt) - 1, len(written.tokens)
    mine = ours[start : start + count].log_softmax(-1)
    divergence, largest = 0.0, 0.0
    for row, theirs in zip(mine, written.logprobs, strict=True):
        tokens, their_logs = torch.tensor(list(theirs)), torch.tensor(list(theirs.values()))
        likely = their_logs.exp()
        difference = their_logs - row[tokens]
        divergence += float((likely * difference).sum()) / count
        largest = max(largest, float((difference.abs() * (likely > 0.01)).max()))
    agree = int((mine.argmax(-1) == torch.tensor(written.tokens)).sum())
    shown = round(divergence, 5) + 0.0  # no "-0.00000"
    detail = (
        f"KL {shown:.5f} nats over {count} tokens, largest difference of a log-probability {largest:.4f}, "
        f"same likeliest token {agree} of {count}"
    )
    return Check(name, abs(divergence) <= (_NEARLY if nearly else _SAME_KL), detail)


def dense_weights(read: Callable[[str], Tensor]) -> Callable[[str], Weight]:
    """Matrices as weights."""
    return lambda name: Dense.of(read(name))


def shapes_check(name: str, wanted: Mapping[str, tuple[object, ...]], found: Mapping[str, tuple[object, ...]]) -> Check:
    """Whether a file has the tensors that it should have, and no others."""
    lacking = sorted(wanted.keys() - found.keys())
    strange = sorted(found.keys() - wanted.keys())
    other = sorted(key for key in wanted.keys() & found.keys() if wanted[key] != found[key])
    said = [
        f"{word} {_few(names)}"
        for word, names in (("lacks", lacking), ("has also", strange), ("other shapes or types:", other))
        if names
    ]
    return Check(name, not said, "; ".join(said) or f"{len(found)} tensors")


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def enough_memory(nbytes: float, out: Path) -> Check | None:
    """A check that says why an engine was not started, if it would not fit beside us; else None."""
    import psutil

    from decoct.engine.budget import format_size

    free = psutil.virtual_memory().available
    if nbytes < 0.8 * free:
        return None
    return Check("load", ok=None, detail=f"{out.name} takes about {format_size(nbytes)}, {format_size(free)} are free")

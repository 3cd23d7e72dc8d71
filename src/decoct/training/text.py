"""The text that a model is trained on: read, divided, and put in order."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from decoct.engine.data import SELF, Data, check_length, load_tokens, text_tokens, tokens_digest
from decoct.methods.training import TrainingMethod
from decoct.model import Model

TEACHER = "teacher"
"""As `data`: the teacher writes the text."""


@dataclass(frozen=True, slots=True)
class Text:
    """Sequences of tokens.

    Attributes:
        train: what is learned from.
        held_out: what training is judged by; may be empty.
        seed: of the order.
    """

    train: Int[Tensor, "sequences length"]
    held_out: Int[Tensor, "few length"]
    seed: int

    @property
    def digest(self) -> str:
        """Identifies the text."""
        return tokens_digest(torch.cat([self.train, self.held_out]))

    def batch(self, number: int, size: int) -> Int[Tensor, "batch length"]:
        """The batch of this number, from 0: a new order for every pass over the text, the same for the same seed."""
        count, rows = self.train.shape[0], []
        orders: dict[int, Tensor] = {}
        for position in range(number * size, (number + 1) * size):
            turn = position // count
            if turn not in orders:
                orders[turn] = torch.randperm(count, generator=torch.Generator().manual_seed(self.seed + turn))
            rows.append(int(orders[turn][position % count]))
        return self.train[rows]


def length_of(method: TrainingMethod, data: Data) -> int:
    """Tokens in a sequence."""
    return method.sequence_length or data.sequence_length


def source_of(method: TrainingMethod, data: Data) -> str:
    """Where the text comes from."""
    source = data.source if method.data is None else method.data
    return TEACHER if source == SELF else source


def read_text(
    method: TrainingMethod, data: Data, model: Model, teacher: Model | None, message: Callable[[str], None]
) -> Text:
    """Read as much as training will use, if there is as much.

    Raises:
        ValueError: there is no such text, or not even one sequence to train on.
    """
    length, source = length_of(method, data), source_of(method, data)
    held_out = method.held_out if method.evaluate_every else 0
    wanted = method.steps(length) * method.batch_size * method.accumulate + held_out
    if source == TEACHER:
        assert teacher is not None
        count = min(wanted, data.num_sequences + held_out)
        written = Data(source=SELF, num_sequences=count, sequence_length=length, seed=data.seed)
        tokens = load_tokens(written, teacher, message)
    else:
        check_length(data.model_copy(update={"sequence_length": length}), model)
        flat = text_tokens(source, model, wanted * length)
        tokens = flat[: len(flat) // length * length].reshape(-1, length)
    if len(tokens) <= held_out:
        raise ValueError(
            f"{source} has {len(tokens)} sequences of {length} tokens, and {held_out} are held out; take a longer "
            "text, or a smaller sequence_length"
        )
    return Text(tokens[: len(tokens) - held_out], tokens[len(tokens) - held_out :], method.seed)

"""The text that a model is trained on: read, divided, and put in order."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from decoct.engine.data import SELF, Data, check_length, load_tokenizer, load_tokens, text_tokens, tokens_digest
from decoct.losses import Batch
from decoct.methods.training import TrainingMethod
from decoct.model import Model
from decoct.samples import read_records
from decoct.training.processes import num_processes

LESSONS = ".jsonl"
"""How files of prompts and answers end."""

TEACHER = "teacher"
"""As `data`: the teacher writes the text."""


@dataclass(frozen=True, slots=True)
class Text:
    """Sequences of tokens.

    Attributes:
        train: what is learned from.
        held_out: what training is judged by; may be empty.
        seed: of the order.
        counts: what each token of both counts, train first; 0: not taught, as prompts; None: all alike.
    """

    train: Int[Tensor, "sequences length"]
    held_out: Int[Tensor, "few length"]
    seed: int
    counts: Float[Tensor, "all length"] | None = None

    @property
    def all(self) -> Int[Tensor, "all length"]:
        """Both, train first."""
        return torch.cat([self.train, self.held_out])

    @property
    def digest(self) -> str:
        """Identifies the text."""
        return tokens_digest(self.all)

    def looks(self, size: int) -> list[tuple[Int[Tensor, "batch length"], Batch]]:
        """The held-out sequences, a batch at a time."""
        rows = range(len(self.train), len(self.train) + len(self.held_out))
        return [self._taken(list(rows[first : first + size])) for first in range(0, len(rows), size)]

    def batch(self, number: int, size: int) -> tuple[Int[Tensor, "batch length"], Batch]:
        """The batch of this number, from 0: a new order for every pass over the text, the same for the same seed."""
        count, rows = self.train.shape[0], []
        orders: dict[int, Tensor] = {}
        for position in range(number * size, (number + 1) * size):
            turn = position // count
            if turn not in orders:
                orders[turn] = torch.randperm(count, generator=torch.Generator().manual_seed(self.seed + turn))
            rows.append(int(orders[turn][position % count]))
        return self._taken(rows)

    def _taken(self, rows: list[int]) -> tuple[Int[Tensor, "batch length"], Batch]:
        """Sequences by their numbers among all, and what is known of their tokens."""
        tokens = self.all[rows]
        if self.counts is None:
            return tokens, Batch.of(tokens)
        counts = self.counts[rows]
        batch = Batch.of(tokens, counts > 0)
        weights = batch.weights * counts.roll(-1, 1).reshape(-1)
        return tokens, batch.weighing(weights / weights.sum())


def length_of(method: TrainingMethod, data: Data) -> int:
    """Tokens in a sequence."""
    return method.sequence_length or data.sequence_length


def steps_of(method: TrainingMethod, length: int) -> int:
    """Optimizer steps with sequences of `length` tokens: each process reads its share of `num_tokens`."""
    steps = method.steps(length)
    return steps if method.num_steps is not None else max(1, round(steps / num_processes()))


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
    steps = steps_of(method, length)
    wanted = steps * method.batch_size * method.accumulate * num_processes() + held_out
    if source == TEACHER:
        assert teacher is not None
        count = min(wanted, data.num_sequences + held_out)
        written = Data(source=SELF, num_sequences=count, sequence_length=length, seed=data.seed)
        tokens = load_tokens(written, teacher, message)
    elif source.endswith(LESSONS):
        check_length(data.model_copy(update={"sequence_length": length}), model)
        return _lessons(method, Path(source).expanduser(), model, length, held_out)
    else:
        check_length(data.model_copy(update={"sequence_length": length}), model)
        flat = text_tokens(source, model, wanted * length)
        tokens = flat[: len(flat) // length * length].reshape(-1, length)
    _check_count(source, len(tokens), length, held_out)
    return Text(tokens[: len(tokens) - held_out], tokens[len(tokens) - held_out :], method.seed)


def _lessons(method: TrainingMethod, path: Path, model: Model, length: int, held_out: int) -> Text:
    """Prompts and answers; the last ones are held out."""
    lessons = read_records(path, load_tokenizer(model), length)
    _check_count(str(path), len(lessons), length, held_out)
    tokens = torch.zeros(len(lessons), max(len(each.tokens) for each in lessons), dtype=torch.long)
    counts = torch.zeros(tokens.shape)
    for row, lesson in enumerate(lessons):
        tokens[row, : len(lesson.tokens)] = torch.tensor(lesson.tokens)
        counts[row, lesson.num_prompt : len(lesson.tokens)] = lesson.weight
    split = len(lessons) - held_out
    return Text(tokens[:split], tokens[split:], method.seed, counts)


def _check_count(source: str, count: int, length: int, held_out: int) -> None:
    if count <= held_out:
        raise ValueError(
            f"{source} has {count} sequences of {length} tokens, and {held_out} are held out; take a longer text, or a "
            "smaller sequence_length"
        )

"""Texts that models write: the teacher's, the student's own, or both token by token; without any data if need be.

Data-free writing is LLM-QAT's (arXiv 2305.17888): a random first token, a few likeliest ones, then drawn ones. Mixing
teacher and student in each token is MiniLLM's (arXiv 2306.08543).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from decoct.arch.hf import dense_model
from decoct.model import Model
from decoct.samples.lesson import Lesson

Step = Callable[[Int[Tensor, "batch new"]], Float[Tensor, "batch vocab"]]
"""Takes in the next tokens of every sequence, and gives the logits after the last."""

Writer = Callable[[], Step]
"""Begins anew: gives a step without a past."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Writing:
    """How texts are written.

    Attributes:
        num_tokens: most tokens of an answer.
        temperature: logits are divided by it; 0: always the likeliest token.
        num_likeliest: so many first tokens are the likeliest ones, the rest are drawn; 3 to 5 in data-free writing.
        end: the token that ends an answer; None: answers have their full length.
        by_student: whether the student writes, alone or with the teacher.
    """

    num_tokens: int = 128
    temperature: float = 1.0
    num_likeliest: int = 0
    end: int | None = None
    by_student: bool = False

    def __post_init__(self) -> None:
        if self.num_tokens < 1 or self.num_likeliest < 0:
            raise ValueError("num_tokens must be at least 1, num_likeliest at least 0")
        if self.temperature < 0:
            raise ValueError(f"temperature must not be negative, but is {self.temperature:g}")


def write(
    writers: Sequence[tuple[Writer, float]], prompts: Sequence[Sequence[int]], rule: Writing, seed: int
) -> list[Lesson]:
    """Answers to prompts, in their order; prompts of one length are answered together.

    Args:
        writers: models with their shares in the mixture of probabilities that each token is drawn from.
        prompts: in tokens, each at least one.
        rule: how to write.
        seed: of the draws.

    Raises:
        ValueError: an empty prompt, or shares that are no positive numbers.
    """
    if not writers or min(share for _, share in writers) <= 0:
        raise ValueError("each model that writes needs a positive share")
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("a prompt is empty; it needs at least one token, such as BOS")
    generator = torch.Generator().manual_seed(seed)
    found: dict[int, Lesson] = {}
    for length in sorted({len(prompt) for prompt in prompts}):
        rows = [row for row, prompt in enumerate(prompts) if len(prompt) == length]
        answers = _answers(writers, torch.tensor([list(prompts[row]) for row in rows]), rule, generator)
        for row, answer in zip(rows, answers, strict=True):
            found[row] = Lesson((*prompts[row], *answer), length, rule.by_student)
    return [found[row] for row in range(len(prompts))]


@torch.no_grad()
def _answers(
    writers: Sequence[tuple[Writer, float]], prompts: Int[Tensor, "batch length"], rule: Writing, generator: Any
) -> list[list[int]]:
    total = sum(share for _, share in writers)
    steps = [(writer(), share / total) for writer, share in writers]
    fed, drawn = prompts, []
    over = torch.zeros(len(prompts), dtype=torch.bool)
    for number in range(rule.num_tokens):
        logits = [(step(fed).float(), share) for step, share in steps]
        likeliest = rule.temperature == 0 or number < rule.num_likeliest
        heat = 1.0 if likeliest else rule.temperature
        chances = torch.stack([torch.softmax(each / heat, -1) * share for each, share in logits]).sum(0)
        token = chances.argmax(-1) if likeliest else torch.multinomial(chances, 1, generator=generator)[:, 0]
        drawn.append(token)
        if rule.end is not None:
            over |= token == rule.end
            if bool(over.all()):
                break
        fed = token[:, None]
    return [_until(row, rule.end) for row in torch.stack(drawn, 1).tolist()]


def _until(tokens: list[int], end: int | None) -> list[int]:
    """The tokens up to the one that ends them, it included."""
    return tokens[: tokens.index(end) + 1] if end in tokens else tokens


def seeds_of_vocabulary(model: Model, count: int, seed: int) -> list[list[int]]:
    """Prompts for writing without data: BOS, if the model has one, and a random token of its vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    bos = model.config.get("bos_token_id")
    first = torch.randint(int(model.config["vocab_size"]), (count,), generator=generator).tolist()
    return [[token] if bos is None else [int(bos), token] for token in first]


def writer_of(model: Model, tensors: dict[str, Tensor]) -> Writer:
    """A writer that keeps keys and values, from all of a model's tensors, unpacked, by checkpoint name."""
    network = dense_model(model.config, model.family, tensors)

    def begin() -> Step:
        past: list[Any] = [None]

        def step(tokens: Int[Tensor, "batch new"]) -> Float[Tensor, "batch vocab"]:
            out = network(input_ids=tokens, past_key_values=past[0], use_cache=True, logits_to_keep=1)
            past[0] = out.past_key_values
            logits: Tensor = out.logits[:, -1]
            return logits

        return step

    return begin

"""What every engine can do, whatever computes in it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from decoct.runtime.sampling import Sampling

Messages = Sequence[Mapping[str, str]]
"""A conversation, oldest first: each with "role" (system, user, assistant) and "content"."""

Prompt = str | Messages
"""Text to go on with, or a conversation to answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How much is written, and how.

    Attributes:
        max_tokens: at most; None: to the end of the context.
        stop: texts at which it ends; they are not part of the answer.
        sampling: how tokens are drawn.
        ignore_end: go on where the model would end: for measurements.
    """

    max_tokens: int | None = 128
    stop: tuple[str, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    ignore_end: bool = False

    def __post_init__(self) -> None:
        """Check.

        Raises:
            ValueError: a value out of its range.
        """
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError("max_tokens must be 1 or more")
        if any(not text for text in self.stop):
            raise ValueError("a stop text must not be empty")


@dataclass(frozen=True, slots=True)
class Piece:
    """What was written in one step.

    Attributes:
        text: perhaps empty: a token may be a part of a character, or of what could become a stop text.
        finish: "stop" (the model ended, or a stop text), "length", "timeout" or "cancelled"; None: it goes on.
    """

    text: str
    finish: str | None = None


@dataclass(frozen=True, slots=True)
class Generation:
    """An answer.

    Attributes:
        text: without the prompt.
        tokens: how many were written.
        prompt_tokens: how many the prompt has.
        finish: why it ended, as in `Piece`.
        seconds: from the beginning to the last token.
        first_token_seconds: from the beginning to the first.
    """

    text: str
    tokens: int
    prompt_tokens: int
    finish: str
    seconds: float
    first_token_seconds: float


@dataclass(frozen=True, slots=True)
class Timing:
    """One measured round.

    Attributes:
        prefill_seconds: for the whole prompt.
        first_token_seconds: until the first token was there.
        decode_seconds: for the tokens after the first.
        prompt_tokens: of the prompt.
        decode_tokens: after the first.
    """

    prefill_seconds: float
    first_token_seconds: float
    decode_seconds: float
    prompt_tokens: int
    decode_tokens: int


OnPiece = Callable[[int, Piece], None]
"""Told which prompt, and what was written."""


class Engine(Protocol):
    """Something that runs a checkpoint.

    Attributes:
        name: as `--engine` spells it.
        about: one line: what computes.
        context: the most tokens that prompt and answer may have together.
        weight_nbytes: bytes of the weights that a token passes through.
    """

    name: str
    about: str
    context: int
    weight_nbytes: int

    @property
    def chats(self) -> bool:
        """Whether it can hold a conversation: most engines need a chat template for it."""

    def generate(
        self, prompts: Sequence[Prompt], options: Options, on_piece: OnPiece = lambda _which, _piece: None
    ) -> list[Generation]:
        """Answer several prompts.

        Raises:
            ValueError: one does not fit into the context, or there is no chat template for a conversation.
        """

    def time(self, prompt_tokens: int, decode_tokens: int) -> Timing:
        """One round of so many tokens, for a benchmark."""

    def close(self) -> None:
        """Let go of what was taken."""

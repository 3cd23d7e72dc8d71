"""Between tokens and text: prompts, chat templates, answers that arrive token by token, stop texts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from decoct.engine.data import load_tokenizer
from decoct.model import Model
from decoct.serving.engine import Messages, Prompt
from decoct.store import FolderSource, read_json

_HALF = "\ufffd"  # what a tokenizer gives for a part of a character


def no_template(label: str) -> str:
    """What is said of a model that cannot hold a conversation."""
    return f"{label} has no chat template; use decoct generate, or /v1/completions"


class Text:
    """A model's tokenizer, its chat template, and the tokens that end an answer.

    Attributes:
        ends: ids of the tokens that end an answer.
        vocabulary: ids that the model knows are smaller than this.
    """

    def __init__(self, model: Model) -> None:
        """Load the tokenizer.

        Raises:
            ValueError: its files are missing or damaged.
        """
        self._tokenizer: Any = load_tokenizer(model)
        self._label = model.source.label
        self.vocabulary = int(model.config["vocab_size"])
        self.ends = _ends(model, self._tokenizer.eos_token_id)

    @property
    def chats(self) -> bool:
        """Whether there is a chat template."""
        return self._tokenizer.chat_template is not None

    def tokens(self, prompt: Prompt) -> list[int]:
        """Ids of a prompt, with the special tokens that the model expects in front; of a conversation by its template.

        Raises:
            ValueError: the prompt is empty, there is no chat template, or it refuses the conversation.
        """
        if isinstance(prompt, str):
            found = list(self._tokenizer(prompt, verbose=False)["input_ids"])
        else:
            found = self._conversation(prompt)
        if not found:
            raise ValueError("the prompt is empty; give at least one token")
        return found

    def decode(self, ids: Sequence[int]) -> str:
        """Text of tokens, special ones left out."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _conversation(self, messages: Messages) -> list[int]:
        from jinja2 import TemplateError

        if not self.chats:
            raise ValueError(no_template(self._label))
        try:
            text = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            raise ValueError(f"the chat template refuses the conversation: {error}") from None
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


class Answer:
    """Text that arrives token by token, held back where it could still change or become a stop text.

    Attributes:
        tokens: ids so far.
        stopped: whether a stop text has come.
    """

    def __init__(self, text: Text, stop: Sequence[str] = ()) -> None:
        self._text, self._stop = text, tuple(stop)
        self._shown, self._read = 0, 0  # tokens: before the last whole character's, and up to it
        self._held = ""
        self.tokens: list[int] = []
        self.stopped = False

    def add(self, token: int) -> str:
        """One more token; gives the text that is certain now."""
        self.tokens.append(token)
        before = self._text.decode(self.tokens[self._shown : self._read])
        now = self._text.decode(self.tokens[self._shown :])
        if now.endswith(_HALF) or len(now) <= len(before):
            return ""
        self._shown, self._read = self._read, len(self.tokens)
        return self._pass(now[len(before) :])

    def rest(self) -> str:
        """What was held back, at the end."""
        if self.stopped:
            return ""
        before = self._text.decode(self.tokens[self._shown : self._read])
        last = self._text.decode(self.tokens[self._shown :])[len(before) :]
        found = self._pass(last)
        held, self._held = self._held, ""
        return found + held

    def _pass(self, new: str) -> str:
        """Let text through up to a stop text, but for an end that might begin one."""
        text = self._held + new
        places = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if places:
            self.stopped, self._held = True, ""
            return text[: min(places)]
        longest = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - longest :]
        return text[: len(text) - longest]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of a text with which a stop text begins."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def _ends(model: Model, tokenizers: int | None) -> frozenset[int]:
    """Every token that config, generation settings or tokenizer say ends a text."""
    stated = [model.config.get("eos_token_id"), tokenizers]
    source = model.source
    if isinstance(source, FolderSource):
        path = Path(source.folder) / "generation_config.json"
        if path.exists():
            stated.append(read_json(path).get("eos_token_id"))
    several = [each if isinstance(each, list) else [each] for each in stated]
    return frozenset(int(token) for each in several for token in each if token is not None)

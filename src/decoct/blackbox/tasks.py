"""What is asked, and what becomes of the answers: instructions, step-by-step rationales, examples in the context."""

import json
import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from decoct.blackbox.client import Answer, Question

Record = dict[str, Any]
"""One line of the data set: prompt, response, and what else is known."""


@dataclass(frozen=True, slots=True)
class Example:
    """A solved prompt."""

    prompt: str
    response: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Task(ABC):
    """A kind of data set.

    Attributes:
        max_tokens: of an answer.
        temperature: at which answers are drawn.
    """

    max_tokens: int = 512
    temperature: float = 0.7

    needs_examples: ClassVar[bool] = False
    """Whether solved prompts are wanted."""

    def question(self, prompt: str, number: int) -> Question:
        """What to ask for a prompt; `number` tells several answers to it apart."""
        return Question(tuple(self.messages(prompt, number)), self.max_tokens, self.temperature, number)

    @abstractmethod
    def messages(self, prompt: str, number: int) -> list[tuple[str, str]]:
        """Role and text of each message."""

    @abstractmethod
    def records(self, prompt: str, answer: Answer, number: int) -> list[Record] | None:
        """Lines of the data set; None if the answer does not have the form that was asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Instruct(Task):
    """Instruction following: the prompt as it is, and the answer to it (as arXiv 2212.10560's data are used)."""

    def messages(self, prompt: str, number: int) -> list[tuple[str, str]]:  # noqa: ARG002 - a Task's
        """Nothing but the prompt."""
        return [("user", prompt)]

    def records(self, prompt: str, answer: Answer, number: int) -> list[Record] | None:  # noqa: ARG002 - a Task's
        """Prompt and answer."""
        return [{"prompt": prompt, "response": answer.text.strip()}]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepByStep(Task):
    """Distilling Step-by-Step (arXiv 2305.02301): a rationale and a label are asked for, and taught as two tasks.

    Attributes:
        examples: prompts solved in the same form: reasoning, then a line "Answer: …".
        rationale_weight: what a rationale counts in training; a label counts 1.
    """

    examples: tuple[Example, ...] = ()
    rationale_weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.rationale_weight > 0:
            raise ValueError(f"rationale_weight must be positive, not {self.rationale_weight:g}")

    def messages(self, prompt: str, number: int) -> list[tuple[str, str]]:  # noqa: ARG002 - a Task's
        """How to answer, solved examples, the prompt."""
        how = 'Think step by step, in few sentences. Then give the result alone on a last line, after "Answer:".'
        shown = [(role, text) for e in self.examples for role, text in (("user", e.prompt), ("assistant", e.response))]
        return [("system", how), *shown, ("user", prompt)]

    def records(self, prompt: str, answer: Answer, number: int) -> list[Record] | None:  # noqa: ARG002 - a Task's
        """One record that asks for the label, one that asks for the rationale."""
        rationale, found, label = answer.text.rpartition("Answer:")
        if not found or not rationale.strip() or not label.strip():
            return None
        return [
            {"prompt": f"[label] {prompt}", "response": label.strip(), "weight": 1.0},
            {"prompt": f"[rationale] {prompt}", "response": rationale.strip(), "weight": self.rationale_weight},
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class InContext(Task):
    """In-context distillation (arXiv 2212.10670): answers that the teacher gives after seeing solved examples.

    Attributes:
        examples: to draw from.
        num_examples: shown with each prompt, never the prompt itself.
        keep_examples: the student sees them too, and learns to learn from them; else it learns to do without
            (arXiv 2209.15189).
        seed: of which examples go with which prompt.
    """

    examples: tuple[Example, ...]
    num_examples: int = 4
    keep_examples: bool = True
    seed: int = 0

    needs_examples: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.num_examples < len(self.examples):
            raise ValueError(
                f"num_examples is {self.num_examples} and there are {len(self.examples)} examples; give more of them, "
                "for a prompt's own answer is not shown with it"
            )

    def messages(self, prompt: str, number: int) -> list[tuple[str, str]]:
        """Solved examples, then the prompt."""
        chosen = self._chosen(prompt, number)
        shown = [(role, text) for e in chosen for role, text in (("user", e.prompt), ("assistant", e.response))]
        return [*shown, ("user", prompt)]

    def records(self, prompt: str, answer: Answer, number: int) -> list[Record] | None:
        """The prompt, with the examples before it where they are kept, and the answer."""
        asked = prompt
        if self.keep_examples:
            chosen = self._chosen(prompt, number)
            asked = "\n\n".join([*(f"{e.prompt}\n{e.response}" for e in chosen), prompt])
        return [{"prompt": asked, "response": answer.text.strip()}]

    def _chosen(self, prompt: str, number: int) -> list[Example]:
        draws = random.Random(f"{self.seed}|{number}|{prompt}")  # noqa: S311 - no secrets here
        others = [example for example in self.examples if example.prompt != prompt]
        return draws.sample(others, min(self.num_examples, len(others)))


def read_prompts(path: Path) -> list[str]:
    """Prompts of a file, each once: JSON lines with "prompt", else one prompt a line.

    Raises:
        ValueError: there is no such file, or nothing in it.
    """
    lines = [line for line in _lines(path) if line.strip()]
    found = [_field(line, "prompt", path) if path.suffix == ".jsonl" else line.strip() for line in lines]
    if not found:
        raise ValueError(f"{path} has no prompts; write one a line")
    return list(dict.fromkeys(found))


def read_examples(path: Path) -> tuple[Example, ...]:
    """Solved prompts of a JSON-lines file with "prompt" and "response".

    Raises:
        ValueError: there is no such file, or a line is something else.
    """
    lines = [line for line in _lines(path) if line.strip()]
    return tuple(Example(_field(line, "prompt", path), _field(line, "response", path)) for line in lines)


def _lines(path: Path) -> Sequence[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason})") from None


def _field(line: str, name: str, path: Path) -> str:
    try:
        found = json.loads(line)[name]
    except (json.JSONDecodeError, KeyError, TypeError):
        found = None
    if not isinstance(found, str) or not found.strip():
        raise ValueError(f'{path}: the line {line[:60]!r} is no JSON object with a text "{name}"')
    return found

"""Texts with prompts from a JSON-lines file, as `decoct ask` writes them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from decoct.samples.lesson import Lesson


def read_records(path: Path, tokenizer: Any, length: int) -> list[Lesson]:
    """Lessons from a file of {"prompt": …, "response": …} or {"text": …}, one object a line, with a "weight" or not.

    Prompts are laid out by the tokenizer's chat template where there is one, else prompt and answer stand on lines of
    their own; answers end with the end-of-text token. Texts that are longer are cut; where nothing of an answer is
    left then, the text is left out.

    Args:
        path: the file.
        tokenizer: the student's.
        length: most tokens of a text.

    Raises:
        ValueError: no such file, a line that is no such object, or nothing left to teach.
    """
    found: list[Lesson] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); give a file of JSON lines") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason})") from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            prompt, response, weight = _parse(line, f"{path}:{number}")
            lesson = replace(_lesson(tokenizer, prompt, response), weight=weight).cut(length)
            if lesson.num_prompt < len(lesson.tokens):
                found.append(lesson)
    if not found:
        raise ValueError(f"{path} has nothing to teach within {length} tokens; allow longer sequences or give more")
    return found


def check_record(value: Any, where: str) -> tuple[str | None, str, float]:
    """Prompt, if any, answer and weight of one object.

    Raises:
        ValueError: it has other keys, or values that are no text.
    """
    if isinstance(value, dict) and isinstance(weight := value.get("weight", 1.0), int | float) and weight > 0:
        if isinstance(value.get("text"), str):
            return None, value["text"], float(weight)
        if isinstance(value.get("prompt"), str) and isinstance(value.get("response"), str):
            return value["prompt"], value["response"], float(weight)
    raise ValueError(f'{where} is not an object with "prompt" and "response", or with "text"')


def _parse(line: str, where: str) -> tuple[str | None, str, float]:
    try:
        return check_record(json.loads(line), where)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not valid JSON ({error})") from None


def _lesson(tokenizer: Any, prompt: str | None, response: str) -> Lesson:
    end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    if prompt is None:
        return Lesson((*_encode(tokenizer, response), *end))
    if tokenizer.chat_template:
        asked = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
        before = _encode(tokenizer, asked)
    else:
        begin = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
        before = [*begin, *_encode(tokenizer, prompt + "\n")]
    return Lesson((*before, *_encode(tokenizer, response), *end), len(before))


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

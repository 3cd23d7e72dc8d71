"""One call to an OpenAI-compatible server (POST …/chat/completions), tried again where that may help.

The standard library is enough for one request and one answer. Nothing here writes the key anywhere.
"""

import hashlib
import http.client
import json
import random
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

_MAY_PASS = {408, 409, 425, 429, 500, 502, 503, 504, 529}
"""HTTP states that another try may change."""

_LONGEST_WAIT = 60.0


@dataclass(frozen=True, slots=True)
class Server:
    """Whom to ask.

    Attributes:
        url: up to the version, such as https://api.example.com/v1.
        model: its name there.
        key: sent as a bearer token; None: none is sent.
        timeout: seconds to wait for an answer.
        num_tries: of each call.
    """

    url: str
    model: str
    key: str | None = field(default=None, repr=False)
    timeout: float = 300.0
    num_tries: int = 6

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"{self.url!r} is no URL; it begins with http:// or https:// and ends with /v1, mostly")
        if self.num_tries < 1:
            raise ValueError(f"num_tries must be at least 1, not {self.num_tries}")


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked.

    Attributes:
        messages: (role, text), in order.
        max_tokens: of the answer.
        temperature: at which it is drawn.
        number: tells apart answers to the same messages.
    """

    messages: tuple[tuple[str, str], ...]
    max_tokens: int = 512
    temperature: float = 0.7
    number: int = 0

    def key(self, server: Server) -> str:
        """Identifies the call."""
        text = json.dumps([server.url.rstrip("/"), server.model, asdict(self)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def most_tokens(self) -> int:
        """No call takes more: a token has at least one byte."""
        return self.max_tokens + sum(len(text.encode()) for _, text in self.messages)


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back.

    Attributes:
        text: of the answer.
        whole: whether the model ended it itself.
        tokens_in: of the prompt, as the server counts them.
        tokens_out: of the answer.
    """

    text: str
    whole: bool
    tokens_in: int
    tokens_out: int


def call(server: Server, question: Question, sleep: Callable[[float], object] = time.sleep) -> Answer:
    """Ask, and ask again after a while where the server is busy or out of reach.

    `sleep` may give true to say that nobody waits for the answer any more. Every try carries the same Idempotency-Key,
    so that servers which know it do not charge twice.

    Raises:
        ValueError: the server refuses, answers something else, or is not to be had at the last try either.
    """
    body = {
        "model": server.model, "max_tokens": question.max_tokens, "temperature": question.temperature,
        "seed": question.number, "messages": [{"role": role, "content": text} for role, text in question.messages],
    }  # fmt: skip
    headers = {"Content-Type": "application/json", "Idempotency-Key": question.key(server)}
    if server.key:
        headers["Authorization"] = f"Bearer {server.key}"
    request = urllib.request.Request(  # noqa: S310 - Server takes no other scheme
        f"{server.url.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers
    )
    for attempt in range(1, server.num_tries + 1):
        wait, reason = min(_LONGEST_WAIT, 2.0 ** (attempt - 1)) * random.uniform(0.5, 1.0), ""  # noqa: S311
        try:
            with urllib.request.urlopen(request, timeout=server.timeout) as response:  # noqa: S310 - as above
                return _parse(json.loads(response.read()), question)
        except urllib.error.HTTPError as error:
            reason = _said(error)
            if error.code not in _MAY_PASS:
                raise ValueError(f"{server.url} refuses: {reason}") from None
            wait = _asked_to_wait(error) or wait
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
            reason = str(error) or type(error).__name__
        except json.JSONDecodeError:
            raise ValueError(
                f"{server.url} answers something else than JSON; is it an OpenAI-compatible URL?"
            ) from None
        if attempt < server.num_tries and sleep(wait):
            break
    raise ValueError(f"{server.url} gave no answer in {server.num_tries} tries ({reason}); try again later")


def _parse(found: Any, question: Question) -> Answer:
    try:
        choice = found["choices"][0]
        text = choice["message"]["content"]
        usage = found.get("usage") or {}
        sent = sum(len(each.encode()) for _, each in question.messages)
        tokens_in = int(usage.get("prompt_tokens", sent))  # a server that counts nothing: one byte, one token
        tokens_out = int(usage.get("completion_tokens", len((text or "").encode())))
    except (KeyError, IndexError, TypeError, AttributeError, ValueError):
        raise ValueError("the server's answer has no choices[0].message.content; is it OpenAI-compatible?") from None
    return Answer(text or "", choice.get("finish_reason", "stop") == "stop", tokens_in, tokens_out)


def _said(error: urllib.error.HTTPError) -> str:
    """The server's own words, in one line."""
    try:
        found = json.loads(error.read())
        words = str(found["error"]["message"])
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, OSError):
        words = str(error.reason)
    return f"{error.code} {' '.join(words.split())[:200]}"


def _asked_to_wait(error: urllib.error.HTTPError) -> float | None:
    """Seconds that the server asks for, within reason."""
    try:
        return min(_LONGEST_WAIT, max(0.0, float(error.headers.get("Retry-After", ""))))
    except ValueError:
        return None

"""What clients of the OpenAI API send, checked; and what they are sent."""

import json
import time
import uuid
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from decoct.runtime.sampling import Sampling
from decoct.serving.engine import Options

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "echo": (False,), "suffix": ("",), "logprobs": (False, 0), "top_logprobs": (0,),
    "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},), "tools": ([],),
    "tool_choice": ("none", "auto"), "functions": ([],), "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}  # fmt: skip
"""Settings that this server does not have, and the values with which they change nothing."""

_IGNORED = ("user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier", "prompt_cache_key")


class ApiError(Exception):
    """An answer that says what is wrong.

    Attributes:
        status: the HTTP status.
        body: {"error": {…}}, as OpenAI's server words it.
    """

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        message = message.encode("utf-8", "replace").decode()  # what a client sent may not be text
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


_Stop = Annotated[str, Field(min_length=1)]


class _StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore")
    include_usage: bool = False


class Request(BaseModel):
    """What both kinds of request have in common.

    Attributes:
        max_tokens: of the answer; None: to the end of the context.
        temperature: 1 unless given, as with OpenAI.
        top_k, min_p, repetition_penalty: beyond OpenAI's, as in `Sampling`.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] = 1.0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=16)] | None = None
    stream: bool | None = False
    stream_options: _StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _leave_out_what_changes_nothing(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        for name, neutral in _NEUTRAL.items():
            if value.get(name) is not None and value[name] not in neutral:
                raise ValueError(f"{name} is not supported by this server; leave it out")
        return {key: each for key, each in value.items() if key not in _NEUTRAL and key not in _IGNORED}

    def options(self, most: int) -> Options:
        """How much is written, and how; `most`: the server's limit."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        sampling = Sampling(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=self.top_p or 1.0,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
        )
        wanted = self.max_tokens
        if wanted is not None and wanted > most:
            raise ApiError(
                400, f"max_tokens is {wanted}, this server's limit is {most}; ask for less", param="max_tokens"
            )
        return Options(max_tokens=wanted, stop=tuple(stop), sampling=sampling)

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with token counts."""
        return self.stream_options is not None and self.stream_options.include_usage


class _Part(BaseModel):
    type: Literal["text"]
    text: str


class _Message(BaseModel):
    model_config = ConfigDict(extra="ignore")
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_Part]

    def plain(self) -> dict[str, str]:
        """As a chat template takes it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(Request):
    """POST /v1/chat/completions."""

    messages: Annotated[list[_Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _one_limit(self) -> "ChatRequest":
        self.max_tokens = self.max_completion_tokens if self.max_tokens is None else self.max_tokens
        return self


class CompletionRequest(Request):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int]
    max_tokens: Annotated[int, Field(ge=1)] | None = 16

    def prompts(self) -> list[str | list[int]]:
        """Each text, or the tokens, to go on with.

        Raises:
            ApiError: there are none, or too many.
        """
        if isinstance(self.prompt, str):
            return [self.prompt]
        texts: list[str | list[int]] = [each for each in self.prompt if isinstance(each, str)]
        found = texts or ([[each for each in self.prompt if isinstance(each, int)]] if self.prompt else [])
        if not 1 <= len(found) <= _MOST_PROMPTS:
            raise ApiError(400, f"give 1 to {_MOST_PROMPTS} prompts, not {len(found)}", param="prompt")
        return found


_MOST_PROMPTS = 16


Kind = TypeVar("Kind", bound=Request)


def parse(kind: type[Kind], body: bytes) -> Kind:
    """A request from its JSON.

    Raises:
        ApiError: it is no JSON, or not what was expected; the first thing that is wrong is named.
    """
    try:
        value = json.loads(body)
        json.dumps(value, ensure_ascii=False).encode()  # halves of characters, which JSON can spell and UTF-8 cannot
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is not JSON in UTF-8") from None
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(str(step) for step in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise ApiError(400, f"{where}: {message}" if where else message, param=where or None) from None


class Reply:
    """Builds the answers to one request, whole or as a stream of chunks."""

    def __init__(self, model: str, *, chat: bool) -> None:
        self._chat, self._id = chat, f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._head = {"id": self._id, "created": int(time.time()), "model": model}

    def whole(self, texts: list[tuple[str, str]], prompt_tokens: int, tokens: int) -> dict[str, Any]:
        """The whole answer; `texts`: of each prompt, and why it ended."""
        choices = [
            {"index": i, "finish_reason": finish, "logprobs": None, **self._content(text)}
            for i, (text, finish) in enumerate(texts)
        ]
        kind = "chat.completion" if self._chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices, "usage": usage(prompt_tokens, tokens)}

    def chunk(self, index: int, text: str | None, finish: str | None) -> dict[str, Any]:
        """A piece of a stream; `text` None: its beginning."""
        content: dict[str, Any] = {"text": text or ""}
        if self._chat:
            content = {"delta": {"role": "assistant", "content": ""} if text is None else {"content": text}}
        choice = {"index": index, "finish_reason": finish, "logprobs": None, **content}
        return {**self._head, "object": self._kind, "choices": [choice]}

    def last(self, prompt_tokens: int, tokens: int) -> dict[str, Any]:
        """The token counts at a stream's end."""
        return {**self._head, "object": self._kind, "choices": [], "usage": usage(prompt_tokens, tokens)}

    @property
    def _kind(self) -> str:
        return "chat.completion.chunk" if self._chat else "text_completion"

    def _content(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}


def usage(prompt_tokens: int, tokens: int) -> dict[str, int]:
    """Token counts."""
    return {"prompt_tokens": prompt_tokens, "completion_tokens": tokens, "total_tokens": prompt_tokens + tokens}

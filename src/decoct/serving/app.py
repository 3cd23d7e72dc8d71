"""The HTTP server: OpenAI's chat and text completions on one model, and what operators look at."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException as StarletteError

from decoct.serving.metrics import Metrics
from decoct.serving.wire import ApiError, ChatRequest, CompletionRequest, Reply, parse
from decoct.serving.wire import Request as Asked
from decoct.serving.worker import Ticket, Worker

_PATIENCE = 8  # times the limit of a body that is read to its end before it is refused
_LOOK_SECONDS = 0.2  # how often a client that waits for a whole answer is asked whether it is still there


def make_app(worker: Worker, name: str, metrics: Metrics) -> FastAPI:
    """The application; it starts and stops the worker.

    Args:
        worker: what writes.
        name: of the model, as clients ask for it.
        metrics: what is counted.
    """
    desk = _Desk(worker, name, metrics)

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        worker.start()
        try:
            yield
        finally:
            await asyncio.to_thread(worker.stop)

    app = FastAPI(title="decoct", lifespan=life, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_api_route("/v1/chat/completions", desk.chat, methods=["POST"], response_model=None)
    app.add_api_route("/v1/completions", desk.complete, methods=["POST"], response_model=None)
    app.add_api_route("/v1/models", desk.models, methods=["GET"], response_model=None)
    app.add_api_route("/v1/models/{name:path}", desk.model, methods=["GET"], response_model=None)
    app.add_api_route("/health", desk.health, methods=["GET"], response_model=None)
    app.add_api_route("/metrics", desk.metrics, methods=["GET"], response_model=None)
    app.add_exception_handler(StarletteError, _not_here)
    return app


class _Desk:
    """Answers requests."""

    def __init__(self, worker: Worker, name: str, metrics: Metrics) -> None:
        self._worker, self._name, self._metrics = worker, name, metrics
        self._began = int(time.time())

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        try:
            asked = parse(ChatRequest, await self._body(request))
            self._check_model(asked.model)
            prompt = self._tokens([message.plain() for message in asked.messages], "messages")
            return await self._answer(request, asked, [prompt], Reply(self._name, chat=True))
        except ApiError as error:
            return self._refuse(error)

    async def complete(self, request: Request) -> Response:
        """POST /v1/completions."""
        try:
            asked = parse(CompletionRequest, await self._body(request))
            self._check_model(asked.model)
            prompts = [self._tokens(prompt, "prompt") for prompt in asked.prompts()]
            return await self._answer(request, asked, prompts, Reply(self._name, chat=False))
        except ApiError as error:
            return self._refuse(error)

    async def models(self) -> Response:
        """GET /v1/models."""
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, name: str) -> Response:
        """GET /v1/models/NAME."""
        try:
            self._check_model(name)
        except ApiError as error:
            return self._refuse(error)
        return JSONResponse(self._card())

    async def health(self) -> Response:
        """GET /health."""
        alive = self._worker.is_alive()
        return JSONResponse({"status": "ok" if alive else "dead"}, 200 if alive else 503)

    async def metrics(self) -> Response:
        """GET /metrics."""
        busy = {"running": self._worker.running, "waiting": self._worker.waiting}
        return PlainTextResponse(self._metrics.text(**busy, seats=self._worker.network.num_seats))

    def _card(self) -> dict[str, Any]:
        return {"id": self._name, "object": "model", "created": self._began, "owned_by": "decoct"}

    def _check_model(self, name: str) -> None:
        if name != self._name:
            raise ApiError(
                404, f"there is no model {name!r} here, only {self._name!r}", param="model", code="model_not_found"
            )

    def _refuse(self, error: ApiError) -> Response:
        self._metrics.answered(error.status)
        return JSONResponse(error.body, error.status)

    async def _body(self, request: Request) -> bytes:
        """A request's body. What is beyond the limit is read but not kept, so that the client can hear the answer."""
        found, most, size = bytearray(), self._worker.limits.body_nbytes, 0
        async for chunk in request.stream():
            size += len(chunk)
            if size <= most:
                found += chunk
            elif size > _PATIENCE * most:
                break
        if size > most:
            raise ApiError(413, f"the request is longer than {most} bytes; shorten it")
        return bytes(found)

    def _tokens(self, prompt: Any, param: str) -> list[int]:
        """A prompt's tokens."""
        vocabulary = self._worker.text.vocabulary
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], int):
            if not all(0 <= token < vocabulary for token in prompt):
                raise ApiError(400, f"tokens are numbers from 0 to {vocabulary - 1}", param=param)
            return list(prompt)
        try:
            return self._worker.text.tokens(prompt)
        except ValueError as error:
            raise ApiError(400, str(error), param=param) from None

    async def _answer(self, request: Request, asked: Asked, prompts: Sequence[list[int]], reply: Reply) -> Response:
        limits = self._worker.limits
        options = asked.options(limits.max_tokens or self._worker.network.context)
        tickets: list[Ticket] = []
        try:
            for prompt in prompts:
                tickets.append(self._worker.submit(prompt, options))  # noqa: PERF401 - those before a refusal are closed
        except ApiError:
            _close(tickets)
            raise
        if asked.stream:
            self._metrics.answered(200)
            stream = self._stream(tickets, reply, usage=asked.with_usage)
            return StreamingResponse(stream, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        return await self._whole(request, tickets, reply)

    async def _whole(self, request: Request, tickets: Sequence[Ticket], reply: Reply) -> Response:
        """The whole answer; given up when the client hangs up."""
        work = asyncio.ensure_future(asyncio.gather(*(_gather(ticket) for ticket in tickets)))
        try:
            while not work.done():
                await asyncio.wait([work], timeout=_LOOK_SECONDS)
                if not work.done() and await request.is_disconnected():
                    self._metrics.answered(499)
                    return Response(status_code=499)
            texts = work.result()
        finally:
            work.cancel()
            _close(tickets)
        self._metrics.answered(200)
        return JSONResponse(reply.whole(texts, *_counts(tickets)))

    async def _stream(self, tickets: Sequence[Ticket], reply: Reply, *, usage: bool) -> AsyncIterator[str]:
        """Server-sent events; a client that hangs up ends this generator, which frees its seats."""
        try:
            for index in range(len(tickets)):
                yield _event(reply.chunk(index, None, None))
            async for index, piece in _merged(tickets):
                if piece.text or piece.finish:
                    yield _event(reply.chunk(index, piece.text, piece.finish))
            if usage:
                yield _event(reply.last(*_counts(tickets)))
            yield "data: [DONE]\n\n"
        except ApiError as error:
            yield _event(error.body)
        finally:
            _close(tickets)


async def _gather(ticket: Ticket) -> tuple[str, str]:
    pieces = [piece async for piece in ticket.pieces()]
    return "".join(piece.text for piece in pieces), pieces[-1].finish or ""


async def _merged(tickets: Sequence[Ticket]) -> AsyncIterator[tuple[int, Any]]:
    """Pieces of several answers, one answer after another; they are written at the same time."""
    for index, ticket in enumerate(tickets):
        async for piece in ticket.pieces():
            yield index, piece


def _close(tickets: Sequence[Ticket]) -> None:
    for ticket in tickets:
        ticket.close()


def _counts(tickets: Sequence[Ticket]) -> tuple[int, int]:
    """Tokens of prompts and of answers."""
    prompts = sum(len(ticket.task.prompt) for ticket in tickets)
    return prompts, sum(len(ticket.task.answer.tokens) for ticket in tickets)


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


async def _not_here(request: Request, error: Exception) -> Response:
    """An address or a verb that the server does not know, worded as its other errors."""
    assert isinstance(error, HTTPException | StarletteError)
    message = f"{request.method} {request.url.path}: {error.detail}"
    return JSONResponse(ApiError(error.status_code, message).body, error.status_code)

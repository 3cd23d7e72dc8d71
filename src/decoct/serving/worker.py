"""The thread that runs a network for a server: tasks come from many clients, one thread goes on with all of them."""

import asyncio
import queue
import threading
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from typing_extensions import override

from decoct.runtime.network import Network
from decoct.serving.batch import Batch, Task, most_tokens
from decoct.serving.engine import Options, Piece
from decoct.serving.metrics import Metrics
from decoct.serving.text import Answer, Text
from decoct.serving.wire import ApiError


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a server takes on.

    Attributes:
        max_tokens: of an answer; None: as many as the context has.
        max_waiting: requests that may wait for a seat.
        seconds: until a request is given up, waiting included.
        body_nbytes: of a request.
    """

    max_tokens: int | None = None
    max_waiting: int = 64
    seconds: float = 600.0
    body_nbytes: int = 4 << 20


class Worker(threading.Thread):
    """Owns a network. Everything but `run` is for the server's thread."""

    def __init__(self, network: Network, text: Text, limits: Limits, metrics: Metrics) -> None:
        super().__init__(name="decoct-worker", daemon=True)
        self.network, self.text, self.limits, self._metrics = network, text, limits, metrics
        self._batch = Batch(network, text)
        self._inbox: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._promised = 0  # tasks that were handed in and have not ended
        self._stopping = False

    @property
    def running(self) -> int:
        """Sequences that are being written."""
        return self._batch.num_running

    @property
    def waiting(self) -> int:
        """Requests without a seat."""
        return max(0, self._promised - self.running)

    def submit(self, prompt: Sequence[int], options: Options) -> "Ticket":
        """Hand a prompt in.

        Raises:
            ApiError: it does not fit into the context, too many are waiting already, or the worker has died.
        """
        if not self.is_alive() or self._stopping:
            raise ApiError(503, "the server is stopping or its worker has died", "server_error", code="unavailable")
        try:
            most_tokens(len(prompt), options.max_tokens, self.network.context)
        except ValueError as error:
            raise ApiError(400, str(error), param="prompt", code="context_length_exceeded") from None
        if self._promised >= self.network.num_seats + self.limits.max_waiting:
            waiting = self.limits.max_waiting
            raise ApiError(
                429, f"{waiting} requests are waiting already; try again later", "rate_limit_error", code="queue_full"
            )
        ticket = Ticket(self, prompt, options)
        self._promised += 1
        self._inbox.put(ticket.task)
        return ticket

    def ended(self, ticket: "Ticket") -> None:
        """A ticket's answer is whole or no longer wanted."""
        task = ticket.task
        self._promised -= 1
        first = None if task.first_token is None else task.first_token - task.began
        self._metrics.wrote(len(task.prompt), len(task.answer.tokens), first, time.monotonic() - task.began)

    def stop(self) -> None:
        """End every sequence, and the thread."""
        self._stopping = True
        self._inbox.put(None)
        self.join()

    @override
    def run(self) -> None:
        try:
            while not self._stopping:
                self._take(block=not self._batch.step())
        finally:
            self._take(block=False)
            self._batch.end_all("cancelled")

    def _take(self, *, block: bool) -> None:
        """Take in what has come; wait for something if there is nothing to do."""
        while True:
            try:
                task = self._inbox.get(block=block)
            except queue.Empty:
                return
            block = False
            if task is not None:
                self._batch.add(task)


class Ticket:
    """One prompt in a worker's hands, seen from the server's event loop.

    Attributes:
        task: what the worker works on.
    """

    def __init__(self, worker: Worker, prompt: Sequence[int], options: Options) -> None:
        self._worker, self._loop = worker, asyncio.get_running_loop()
        self._pieces: asyncio.Queue[Piece] = asyncio.Queue()
        deadline = time.monotonic() + worker.limits.seconds
        self.task = Task(prompt, options, Answer(worker.text, options.stop), self._put, deadline)
        self._open = True

    def _put(self, piece: Piece) -> None:
        """From the worker's thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)

    async def pieces(self) -> AsyncIterator[Piece]:
        """What is written, until it ends.

        Raises:
            ApiError: it was given up.
        """
        while True:
            piece = await self._pieces.get()
            if piece.finish == "timeout":
                raise ApiError(
                    504, f"not finished after {self._worker.limits.seconds:g} s", "timeout_error", code="timeout"
                )
            if piece.finish == "cancelled":
                raise ApiError(503, "the server is stopping", "server_error", code="unavailable")
            yield piece
            if piece.finish is not None:
                return

    def close(self) -> None:
        """Nobody waits for it any more, or it is whole. The second call does nothing."""
        if self._open:
            self._open = False
            self.task.cancelled = True
            self._worker.ended(self)

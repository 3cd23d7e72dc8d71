"""Many calls: each answer is on disk before it is used, so that none is paid for twice; limits are kept.

A cache is a folder with one small file for each answer, whole or absent. A call that a crash cuts off between the
server's answer and the disk is the only one that is made again, with the same Idempotency-Key.
"""

import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Self

from filelock import FileLock, Timeout

from decoct.blackbox.client import Answer, Question, Server, call
from decoct.blackbox.limit import Limit
from decoct.store.files import read_json, write_json


class LimitReached(Exception):  # noqa: N818 - no error: what was asked for
    """The next call might pass a limit."""


class Asker:
    """Asks a server, with a cache and limits; use it as a context manager, which locks the cache.

    Attributes:
        num_calls: calls that were made, not found in the cache.
        tokens_in: of all prompts in the cache, as paid.
        tokens_out: of all answers.
    """

    def __init__(
        self, server: Server, cache: Path, limit: Limit, sleep: Callable[[float], object] | None = None
    ) -> None:
        """Count what is in the cache.

        Raises:
            ValueError: the cache is damaged.
        """
        self.num_calls = 0
        self._server, self._cache, self._limit = server, cache, limit
        self._stopped = threading.Event()
        self._sleep = self._stopped.wait if sleep is None else sleep
        self._guard, self._file_lock = threading.Lock(), FileLock(cache / ".lock")
        found = [_read(path) for path in cache.glob("??/*.json")]
        self.tokens_in = sum(answer.tokens_in for answer in found)
        self.tokens_out = sum(answer.tokens_out for answer in found)
        self._reserved = [0, 0]

    def __enter__(self) -> Self:
        """Lock the cache.

        Raises:
            ValueError: another process holds it.
        """
        self._cache.mkdir(parents=True, exist_ok=True)
        try:
            self._file_lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(f"{self._cache} is in use by another run; wait for it, or take another --cache") from None
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        """Unlock it."""
        self._file_lock.release()

    @property
    def cost(self) -> float:
        """What everything in the cache has cost."""
        return self._limit.cost(self.tokens_in, self.tokens_out)

    def ask(self, question: Question) -> Answer:
        """The answer, from the cache if it is there.

        Raises:
            LimitReached: it is not, and asking might pass a limit.
            ValueError: as `call`.
        """
        key = question.key(self._server)
        path = self._cache / key[:2] / f"{key}.json"
        if path.exists():
            return _read(path)
        most_in = question.most_tokens() - question.max_tokens
        with self._guard:
            sums = self.tokens_in + self._reserved[0] + most_in, self.tokens_out + self._reserved[1]
            if not self._limit.allows(sums[0], sums[1] + question.max_tokens):
                raise LimitReached
            self._reserve(most_in, question.max_tokens)
        try:
            answer = call(self._server, question, self._sleep)
            write_json(path, {"question": asdict(question), "model": self._server.model, "answer": asdict(answer)})
        finally:
            with self._guard:
                self._reserve(-most_in, -question.max_tokens)
        with self._guard:
            self.num_calls += 1
            self.tokens_in += answer.tokens_in
            self.tokens_out += answer.tokens_out
        return answer

    def ask_all(
        self,
        questions: Sequence[Question],
        parallel: int = 4,
        on_progress: Callable[[int, int], None] = lambda *_: None,
    ) -> list[Answer | None]:
        """Answers in the questions' order; None where a limit came before.

        What is under way when something goes wrong, or somebody presses Ctrl-C, is waited for and kept.

        Raises:
            ValueError: as `call`; nothing new is asked after the first.
        """
        found: dict[Question, Answer | None] = {}
        pool = ThreadPoolExecutor(max_workers=parallel)
        try:
            futures = {question: pool.submit(self._ask_within, question) for question in dict.fromkeys(questions)}
            for done, (question, future) in enumerate(futures.items(), start=1):
                found[question] = future.result()
                on_progress(done, len(futures))
        finally:
            self._stopped.set()  # nobody waits for another try
            pool.shutdown(wait=True, cancel_futures=True)
            self._stopped.clear()
        return [found[question] for question in questions]

    def _ask_within(self, question: Question) -> Answer | None:
        if self._stopped.is_set():
            return None
        try:
            return self.ask(question)
        except LimitReached:
            return None
        except ValueError:
            self._stopped.set()
            raise

    def _reserve(self, tokens_in: int, tokens_out: int) -> None:
        self._reserved[0] += tokens_in
        self._reserved[1] += tokens_out


def _read(path: Path) -> Answer:
    try:
        return Answer(**read_json(path)["answer"])
    except (KeyError, TypeError, json.JSONDecodeError):
        raise ValueError(f"{path} is no cached answer; delete it, and it is asked again") from None

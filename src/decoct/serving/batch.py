"""Sequences that share one network: each takes a free seat, and all that have one go on together, a token a step."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from decoct.runtime.network import Feed, Network
from decoct.runtime.sampling import Sampler
from decoct.serving.engine import Options, Piece
from decoct.serving.text import Answer, Text

_PIECE = 256  # tokens of a prompt in one step, so that a long one does not make the others wait


@dataclass(eq=False)
class Task:
    """A prompt on its way to an answer.

    Attributes:
        prompt: its tokens.
        options: what is wanted.
        on_piece: told what was written, and at last why it ended.
        deadline: `time.monotonic()` at which it is given up; None: never.
        cancelled: set by whoever no longer wants the answer.
        answer: what there is so far.
        began: when it was handed in, and when its first token was there, `time.monotonic()`.
    """

    prompt: Sequence[int]
    options: Options
    answer: Answer
    on_piece: Callable[[Piece], None]
    deadline: float | None = None
    cancelled: bool = False
    began: float = field(default_factory=time.monotonic)
    first_token: float | None = None
    ended: float | None = None


@dataclass(eq=False)
class _Seated:
    task: Task
    sampler: Sampler
    most: int
    fed: int = 0
    last: int | None = None

    def next_tokens(self) -> Sequence[int]:
        """What goes into the network now: a piece of the prompt, or the token that was drawn last."""
        if self.fed < len(self.task.prompt):
            return self.task.prompt[self.fed : self.fed + _PIECE]
        assert self.last is not None
        return [self.last]


class Batch:
    """The sequences of one network. Not for several threads at once, except `Task.cancelled`."""

    def __init__(self, network: Network, text: Text) -> None:
        self._network, self._text = network, text
        self._free = list(reversed(range(network.num_seats)))
        self._seated: dict[int, _Seated] = {}
        self._waiting: deque[Task] = deque()

    @property
    def num_running(self) -> int:
        """Sequences that have a seat."""
        return len(self._seated)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for one."""
        return len(self._waiting)

    def most_tokens(self, prompt: Sequence[int], options: Options) -> int:
        """How many tokens an answer may have.

        Raises:
            ValueError: prompt and answer do not fit into the context.
        """
        return most_tokens(len(prompt), options.max_tokens, self._network.context)

    def add(self, task: Task) -> None:
        """Put a task at the queue's end.

        Raises:
            ValueError: prompt and answer do not fit into the context.
        """
        self.most_tokens(task.prompt, task.options)
        self._waiting.append(task)

    def step(self) -> bool:
        """Go on with every sequence by a token, or a piece of its prompt; False: there was nothing to do."""
        self._leave_out()
        while self._waiting and self._free:
            task = self._waiting.popleft()
            most = self.most_tokens(task.prompt, task.options)
            self._seated[self._free.pop()] = _Seated(task, Sampler(task.options.sampling, task.prompt), most)
        if not self._seated:
            return False
        feeds = [Feed(seat, each.next_tokens()) for seat, each in self._seated.items()]
        logits = self._network.advance(feeds)
        for row, feed in zip(logits, feeds, strict=True):
            each = self._seated[feed.seat]
            if each.last is None:
                each.fed += len(feed.tokens)
            if each.fed >= len(each.task.prompt):
                self._take(feed.seat, each, each.sampler.draw(row))
        return True

    def end_all(self, finish: str) -> None:
        """End every sequence."""
        for seat in list(self._seated):
            self._end(seat, "", finish)
        while self._waiting:
            _finish(self._waiting.popleft(), "", finish)

    def _take(self, seat: int, each: _Seated, token: int) -> None:
        """A token was drawn."""
        task, answer = each.task, each.task.answer
        if task.first_token is None:
            task.first_token = time.monotonic()
        each.last = token
        ends = token in self._text.ends and not task.options.ignore_end
        text = "" if ends else answer.add(token)
        if ends or answer.stopped:
            self._end(seat, text, "stop")
        elif len(answer.tokens) >= each.most:
            self._end(seat, text, "length")
        else:
            task.on_piece(Piece(text))

    def _end(self, seat: int, text: str, finish: str) -> None:
        task = self._seated.pop(seat).task
        self._network.release(seat)
        self._free.append(seat)
        _finish(task, text, finish)

    def _leave_out(self) -> None:
        """Let go of what nobody waits for any more."""
        now = time.monotonic()
        for seat, each in list(self._seated.items()):
            reason = _given_up(each.task, now)
            if reason is not None:
                self._end(seat, "", reason)
        for task in list(self._waiting):
            reason = _given_up(task, now)
            if reason is not None:
                self._waiting.remove(task)
                _finish(task, "", reason)


def most_tokens(prompt: int, max_tokens: int | None, context: int) -> int:
    """How many tokens an answer may have.

    Raises:
        ValueError: prompt and answer do not fit into the context.
    """
    room = context - prompt
    if room < 1:
        raise ValueError(
            f"the prompt has {prompt} tokens, the context is {context}; shorten it or take a larger context"
        )
    if max_tokens is not None and max_tokens > room:
        raise ValueError(
            f"the prompt has {prompt} tokens and max_tokens is {max_tokens}, the context is {context}; "
            f"ask for at most {room}"
        )
    return room if max_tokens is None else max_tokens


def _given_up(task: Task, now: float) -> str | None:
    if task.cancelled:
        return "cancelled"
    return "timeout" if task.deadline is not None and now > task.deadline else None


def _finish(task: Task, text: str, finish: str) -> None:
    task.ended = time.monotonic()
    whole = text + task.answer.rest()
    task.on_piece(Piece(whole, "stop" if task.answer.stopped else finish))

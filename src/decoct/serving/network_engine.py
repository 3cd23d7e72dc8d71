"""The engine that runs a network in this process: decoct's decode loop, or transformers."""

import time
from collections.abc import Callable, Sequence

import torch

from decoct.model import Model
from decoct.runtime.network import Feed, Network
from decoct.serving.batch import Batch, Task
from decoct.serving.engine import Generation, OnPiece, Options, Piece, Prompt, Timing
from decoct.serving.text import Answer, Text


class NetworkEngine:
    """Runs sequences together, as many as the network has seats.

    Attributes:
        name: as `--engine` spells it.
        about: one line: what computes.
        context: the most tokens that prompt and answer may have together.
        weight_nbytes: bytes of the weights that a token passes through.
        network: what computes.
        text: the model's tokenizer.
    """

    def __init__(self, name: str, model: Model, network: Network, remove: Callable[[], None] = lambda: None) -> None:
        self.name, self.network = name, network
        self._remove = remove
        self.about, self.context = network.about, network.context
        self.weight_nbytes = network.nbytes
        self._model = model
        self._text: Text | None = None

    @property
    def text(self) -> Text:
        """The model's tokenizer, loaded when it is used: a benchmark needs none."""
        if self._text is None:
            self._text = Text(self._model)
        return self._text

    @property
    def chats(self) -> bool:
        """Whether the model has a chat template."""
        return self.text.chats

    def generate(
        self, prompts: Sequence[Prompt], options: Options, on_piece: OnPiece = lambda _which, _piece: None
    ) -> list[Generation]:
        """Answer several prompts; see `Engine`."""
        batch = Batch(self.network, self.text)
        found: list[tuple[Task, list[Piece]]] = []
        for which, prompt in enumerate(prompts):
            pieces: list[Piece] = []

            def take(piece: Piece, which: int = which, pieces: list[Piece] = pieces) -> None:
                pieces.append(piece)
                on_piece(which, piece)

            task = Task(self.text.tokens(prompt), options, Answer(self.text, options.stop), take)
            batch.add(task)
            found.append((task, pieces))
        try:
            while batch.step():
                pass
        finally:
            batch.end_all("cancelled")  # on Ctrl-C too: the network's seats are free for what comes next
        return [_generation(task, pieces) for task, pieces in found]

    def time(self, prompt_tokens: int, decode_tokens: int) -> Timing:
        """One round of so many tokens, drawn with a seed; see `Engine`."""
        vocabulary = int(self._model.config["vocab_size"])
        drawn = torch.randint(vocabulary, (prompt_tokens,), generator=torch.Generator().manual_seed(0))
        prompt, seat = drawn.tolist(), 0
        began = time.perf_counter()
        logits = self.network.advance([Feed(seat, prompt)])
        filled = time.perf_counter()
        token = int(logits[0].argmax())
        first = time.perf_counter()
        for _ in range(decode_tokens):
            token = int(self.network.advance([Feed(seat, [token])])[0].argmax())
        ended = time.perf_counter()
        self.network.release(seat)
        return Timing(filled - began, first - began, ended - first, prompt_tokens, decode_tokens)

    def close(self) -> None:
        """Take away what was only written for it."""
        self._remove()


def _generation(task: Task, pieces: Sequence[Piece]) -> Generation:
    assert task.ended is not None
    assert pieces[-1].finish is not None
    return Generation(
        text="".join(piece.text for piece in pieces),
        tokens=len(task.answer.tokens),
        prompt_tokens=len(task.prompt),
        finish=pieces[-1].finish,
        seconds=task.ended - task.began,
        first_token_seconds=(task.first_token or task.ended) - task.began,
    )

"""The loop: steps, looks at held-out text, checkpoints; stopped anywhere, it goes on bit for bit."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from decoct.engine.stream import Event, OnEvent
from decoct.engine.tune import CHECKPOINT
from decoct.losses import Batch
from decoct.methods.training import TrainingMethod
from decoct.store import open_safetensors, save_safetensors
from decoct.training.inside import Seen
from decoct.training.lessons import Lessons
from decoct.training.network import Student
from decoct.training.objective import Objective
from decoct.training.optimizer import Optimizer
from decoct.training.processes import num_processes, process_number, said_by_first, wait_for_all
from decoct.training.progress import Progress
from decoct.training.text import Text, steps_of

BEST = "best.safetensors"
"""The parameters that did best on held-out text, in a stage's folder."""

_SAVE_SECONDS = 60.0  # least time between two checkpoints
_SAVE_SHARE = 20.0  # between two checkpoints so many times what writing one takes
_TRIAL = 3  # steps after which the time that is left is known


@dataclass(frozen=True, slots=True)
class Training:
    """Everything that training needs.

    Attributes:
        method: settings.
        student: the model.
        teach: from tokens to what a teacher makes of them; None where the objective needs no teacher.
        objective: what is lessened.
        text: to train on.
        folder: where checkpoints go.
        on_event: told of every step.
        message: told what else a user should know.
    """

    method: TrainingMethod
    student: Student
    teach: Callable[[Int[Tensor, "batch seq"]], Seen] | None
    objective: Objective
    text: Text
    folder: Path
    on_event: OnEvent
    message: Callable[[str], None]


class Trainer:
    """Training under way.

    Attributes:
        progress: how far it has come.
    """

    def __init__(self, todo: Training) -> None:
        """Begin, or take up the last checkpoint.

        Raises:
            ValueError: nothing is trained, or the text is another one than before.
        """
        from accelerate import Accelerator, DistributedDataParallelKwargs

        method = todo.method
        self._todo = todo
        self._optimizer = Optimizer(todo.student, method.weight_decay)
        unused = DistributedDataParallelKwargs(find_unused_parameters=not todo.objective.terms)
        self._accelerator = Accelerator(
            cpu=True, gradient_accumulation_steps=method.accumulate, kwargs_handlers=[unused]
        )
        self._student, self._adam = self._accelerator.prepare(todo.student, self._optimizer.adam)
        length = todo.text.train.shape[1]
        self.progress = Progress(steps_of(method, length), todo.text.digest)
        self._lessons = Lessons.of(method, todo.text, todo.student)
        self._restore()
        wait_for_all()  # before the first writes over what the others read
        self._saved, self._save_takes = time.perf_counter(), 0.0

    def run(self) -> None:
        """Do the steps that are left, then take the best state there was.

        Raises:
            ValueError: the loss or a gradient is not finite.
            KeyboardInterrupt: somebody asked to stop; the state is saved.
        """
        progress, method = self.progress, self._todo.method
        for step, loss in enumerate(progress.losses):
            self._tell(step, loss, 0.0)
        with _asked_to_stop() as asked:
            while not progress.over:
                self._one_step()
                if self._agreed(asked.is_set()):
                    self._save()
                    raise KeyboardInterrupt
        wait_for_all()  # for what the first has written
        if method.evaluate_every and progress.looks:
            self._optimizer.restore(_read(self._todo.folder / BEST), len(progress.losses))

    def _one_step(self) -> None:
        """A step, and what is due after it."""
        progress, method, begun = self.progress, self._todo.method, time.perf_counter()
        step = len(progress.losses)
        loss = self._step(step)
        progress.losses.append(loss)
        progress.seconds += time.perf_counter() - begun
        progress.settle(method, _TRIAL)
        self._tell(step, loss, time.perf_counter() - begun)
        due = method.evaluate_every and (len(progress.losses) % method.evaluate_every == 0 or progress.over)
        if due:
            self._look()
        waits = max(_SAVE_SECONDS, _SAVE_SHARE * self._save_takes)
        if progress.over or time.perf_counter() - self._saved > waits:
            self._save()

    def _agreed(self, asked: bool) -> bool:
        """Whether to stop; all processes go by the first one's clock, and by who asked it."""
        progress = self.progress
        mine = [asked, progress.total, progress.settled, progress.stopped]
        asked, progress.total, progress.settled, progress.stopped = said_by_first(mine)
        return asked

    def _step(self, step: int) -> float:
        """Change the parameters once; gives the loss before that."""
        method = self._todo.method
        self._optimizer.set_rate(method.rate(step, self.progress.total))
        total = 0.0
        for part in range(method.accumulate):
            tokens, batch = self._lessons.batch(step, part, self.progress.total)
            with self._accelerator.accumulate(self._student):
                loss = self._loss(tokens, batch)
                self._accelerator.backward(loss)
                total += float(loss.detach()) / method.accumulate
                if self._accelerator.sync_gradients:
                    self._clip()
                self._adam.step()
                self._adam.zero_grad()
        return total if num_processes() == 1 else float(self._accelerator.reduce(torch.tensor(total), "mean"))

    def _loss(self, tokens: Int[Tensor, "batch seq"], batch: Batch) -> Tensor:
        """Mean over tokens."""
        todo = self._todo
        taught = None if todo.teach is None else todo.teach(tokens)
        return self._student(tokens, todo.objective, taught, batch)  # type: ignore[no-any-return]

    def _clip(self) -> None:
        """Bring the gradients to the largest norm that is allowed; refuse those that are no numbers."""
        clip = self._todo.method.clip
        norm = self._accelerator.clip_grad_norm_(self._student.parameters(), clip or float("inf"))
        if not torch.isfinite(norm):
            raise ValueError("the gradient is not finite; lower learning_rate")

    @torch.no_grad()
    def _look(self) -> None:
        """Measure on held-out text; keep the best state, and stop where nothing gets better."""
        progress, method = self.progress, self._todo.method
        batches = self._todo.text.looks(method.batch_size)
        losses = [(float(self._loss(tokens, batch)), len(tokens)) for tokens, batch in batches]
        loss = sum(each * count for each, count in losses) / sum(count for _, count in losses)
        self._lessons.mixer.judged(loss)
        better = loss < progress.best
        progress.looks.append((len(progress.losses), loss))
        progress.stopped = progress.stopped or progress.lost_patience(method.patience)
        if better and process_number() == 0:
            save_safetensors(self._todo.folder / BEST, self._optimizer.values(), {"steps": str(len(progress.losses))})
            self._save()  # together: going on from an earlier state would leave the best of a future that never was
        mark = ", the best so far" if better else ""
        self._todo.message(f"after step {len(progress.losses)}: {loss:.4f} on held-out text{mark}")

    def _tell(self, step: int, loss: float, seconds: float) -> None:
        progress, method = self.progress, self._todo.method
        tokens = num_processes() * method.batch_size * method.accumulate * self._todo.text.train.shape[1]
        speed = f", {tokens / seconds:.0f} tokens/s" if seconds else ""
        self._todo.on_event(Event(f"step {step + 1}{speed}", step + 1, progress.total, None, seconds, 0, loss=loss))

    def _save(self) -> None:
        if process_number():
            return
        begun = time.perf_counter()
        self.progress.mixing = self._lessons.mixer.state() if self._todo.method.replay else {}
        tensors = {**self._optimizer.state(), "rng": torch.get_rng_state()}
        save_safetensors(self._todo.folder / CHECKPOINT, tensors, {"progress": self.progress.written()})
        self._saved = time.perf_counter()
        self._save_takes = self._saved - begun

    def _restore(self) -> None:
        """Take up the last checkpoint, if there is one."""
        path = self._todo.folder / CHECKPOINT
        if not path.exists():
            return
        self.progress = read_progress(path)
        if self.progress.text != self._todo.text.digest:
            raise ValueError("the training text has changed since this run began; give the same one, or add --fresh")
        tensors = _read(path)
        self._optimizer.restore(tensors, len(self.progress.losses))
        torch.set_rng_state(tensors["rng"])
        if self.progress.mixing:
            self._lessons.mixer.restore(self.progress.mixing)


def read_progress(checkpoint: Path) -> Progress:
    """How far the training came that wrote a checkpoint."""
    return Progress.read(open_safetensors(checkpoint).metadata["progress"])


def _read(path: Path) -> dict[str, Tensor]:
    saved = open_safetensors(path)
    return {name: saved.read(name) for name in saved.tensors}


@contextmanager
def _asked_to_stop() -> Iterator[threading.Event]:
    """An event that Ctrl-C sets, so that a step is never cut in two; a second Ctrl-C interrupts at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = signal.getsignal(signal.SIGINT)

    def note(*_: object) -> None:
        asked.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)

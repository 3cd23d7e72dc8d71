"""What stages that train a whole model share: their settings, and the rate of each step."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from decoct.methods.base import ModelMethod

Schedule = Literal["cosine", "linear", "constant", "wsd"]
Trained = Literal["matrices", "norms", "ends", "lora", "qa_lora", "corrections"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingMethod(ModelMethod):
    """Settings of training.

    Attributes:
        teacher: folder or hub id of the model that is imitated, or a list of several; None: the model that the recipe
            begins with.
        teachers: of several: the weighted `mean` of their probabilities, or for each token the `surest` one.
        teacher_weights: of several, in the mean; None: all alike.
        keep_teacher: run the teacher over the text once, keep its so many likeliest tokens on disk, and learn from them
            (loss `cached_kl`); it is not in memory meanwhile. 0: it runs in every step.
        loss: what is lessened: a loss's name, or {name: {setting: value}}.
        num_tokens: tokens to train on; a text that has fewer is read again in another order.
        num_steps: optimizer steps, instead of `num_tokens`.
        minutes: stop about then, whatever is left: the schedule is made to end there.
        learning_rate: largest change of a tensor in one step, relative to the root mean square of its entries.
        schedule: how the rate goes down: along a cosine or a line to zero, not at all, or at the very end (wsd).
        warmup: fraction of the steps in which the rate rises.
        decay: of wsd: fraction of the steps at the end in which the rate falls to zero.
        weight_decay: as AdamW has it, of matrices.
        clip: largest norm of all gradients together; 0: none.
        batch_size: sequences that are run together.
        accumulate: such batches in one step.
        sequence_length: tokens in each; None: the recipe's data.sequence_length.
        data: text to train on: a file (.jsonl: prompts, which are not taught, and answers), a hub dataset, or
            `teacher`: it writes the text (arXiv 2305.17888); None: the recipe's data.source, and the teacher's own
            words where that is `self`.
        on_policy: fraction of the steps that learn from what the student writes itself, going on from the text.
        replay: texts of its own that the student keeps to read again; `on_policy` is then only the share to begin with,
            which rises by 0.1 whenever the loss on held-out text has risen by 0.1 nats, and of the steps on own texts
            fewer and fewer write new ones (DistiLLM, arXiv 2402.03898). 0: the share is fixed, every text new.
        cache: how keys and values are rounded meanwhile, as a recipe's stage `cache` spells it, such as
            {kivi: {bits: 4}} (LLM-QAT, arXiv 2305.17888); gradients pass straight through. None: as the model's own
            policy says, if it has one.
        train: what is trained. `matrices`: all numbers that the blocks' matrices store, in the form they have; `norms`:
            gains and biases; `ends`: embedding and lm_head; `lora`: a low-rank term beside each matrix, which stays;
            `qa_lora`: a low-rank term that ends in the zero points of quantized matrices; `corrections`: the low-rank
            terms that stand beside matrices already (LoftQ's, EoRA's, an adapter's), and nothing else of these.
        rank: of `lora` and `qa_lora`.
        evaluate_every: steps between two looks at held-out text; 0: none, the last state is kept.
        held_out: sequences that are held out.
        patience: looks without improvement after which training stops; 0: it never does.
        recompute: run each block again for its gradient instead of keeping what it computed; None: where memory asks
            for it.
        seed: of the order of sequences, and of what starts at random.
    """

    teacher: str | tuple[str, ...] | None = None
    teachers: Literal["mean", "surest"] = "mean"
    teacher_weights: tuple[float, ...] | None = None
    keep_teacher: int = 0
    loss: str | dict[str, Any] = "forward_kl"
    num_tokens: int = 1_000_000
    num_steps: int | None = None
    minutes: float | None = None
    learning_rate: float = 1e-3
    schedule: Schedule = "cosine"
    warmup: float = 0.05
    decay: float = 0.2
    weight_decay: float = 0.0
    clip: float = 1.0
    batch_size: int = 4
    accumulate: int = 1
    sequence_length: int | None = None
    data: str | None = None
    on_policy: float = 0.0
    replay: int = 0
    cache: dict[str, Any] | None = None
    train: tuple[Trained, ...] = ("matrices", "norms")
    rank: int = 16
    evaluate_every: int = 0
    held_out: int = 8
    patience: int = 0
    recompute: bool | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if (
            min(
                self.num_tokens,
                self.batch_size,
                self.accumulate,
                self.rank,
                self.held_out,
                1 if self.num_steps is None else self.num_steps,
            )
            < 1
        ):
            raise ValueError("num_tokens, num_steps, batch_size, accumulate, rank and held_out must be at least 1")
        if min(self.evaluate_every, self.patience, self.weight_decay, self.clip, self.replay) < 0:
            raise ValueError("evaluate_every, patience, weight_decay, clip and replay must not be negative")
        if self.minutes is not None and not self.minutes > 0:
            raise ValueError(f"minutes must be more than 0, not {self.minutes}")
        self._check_teachers()
        if not self.train:
            raise ValueError("train is empty: name what to train, such as [matrices, norms]")
        if len({"matrices", "lora", "qa_lora", "corrections"} & set(self.train)) > 1:
            raise ValueError("train: matrices, lora, qa_lora and corrections exclude each other; take one of them")
        self._check_rates()

    def _check_teachers(self) -> None:
        if self.keep_teacher < 0 or self.teacher == ():
            raise ValueError("keep_teacher must not be negative, and a list of teachers not empty")
        if self.teacher_weights is not None:
            count = len(self.teacher) if isinstance(self.teacher, tuple) else 1
            if len(self.teacher_weights) != count or min(self.teacher_weights) <= 0:
                raise ValueError(f"teacher_weights needs {count} positive numbers, one for each teacher")

    def _check_rates(self) -> None:
        if not 0 < self.learning_rate < 1:
            raise ValueError("learning_rate must lie between 0 and 1: it is relative to the size of a tensor's entries")
        if not (0 <= self.warmup <= 1 and 0 <= self.decay <= 1 and 0 <= self.on_policy <= 1):
            raise ValueError("warmup, decay and on_policy are fractions of the steps, between 0 and 1")
        if self.replay and not self.evaluate_every:
            raise ValueError("replay needs evaluate_every: the share of own texts follows the loss on held-out text")
        if self.patience and not self.evaluate_every:
            raise ValueError("patience needs evaluate_every: how many steps lie between two looks at held-out text")

    @property
    def student_writes(self) -> bool:
        """Whether steps may learn from what the student writes."""
        return self.on_policy > 0 or self.replay > 0

    def trains(self, what: str) -> bool:
        """Whether `train` names it."""
        return what in self.train

    def steps(self, length: int) -> int:
        """Optimizer steps with sequences of `length` tokens, if time allows them all."""
        if self.num_steps is not None:
            return self.num_steps
        return max(1, round(self.num_tokens / (length * self.batch_size * self.accumulate)))

    def rate(self, step: int, total: int) -> float:
        """The learning rate of a step, counted from 0, of `total`."""
        rise = min(1.0, (step + 1) / max(1.0, self.warmup * total))
        return self.learning_rate * rise * self._fall(step / total)

    def _fall(self, progress: float) -> float:
        """What is left of the rate, at this fraction of the steps."""
        match self.schedule:
            case "cosine":
                return 0.5 * (1.0 + math.cos(math.pi * progress))
            case "linear":
                return 1.0 - progress
            case "wsd":
                return min(1.0, (1.0 - progress) / self.decay) if self.decay else 1.0
            case "constant":
                return 1.0

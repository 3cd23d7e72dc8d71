"""What each step learns from: the text, or what the student writes itself (GKD, arXiv 2306.13649)."""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from decoct.losses import Batch, MiniLLM
from decoct.methods.training import TrainingMethod
from decoct.samples import Mixer, Mixing, Source, Writing, collate, write, writer_of
from decoct.training.network import Student
from decoct.training.objective import Objective
from decoct.training.processes import num_processes, process_number
from decoct.training.text import Text

_PROMPT = 0.25  # of a sequence of the text: what the student goes on from


@dataclass(frozen=True, slots=True)
class Lessons:
    """Batches, one after another; which they are depends on the seed, the step, the student and the mixer alone.

    Attributes:
        method: settings.
        text: to learn from, and to go on from.
        student: who writes.
        mixer: how often it does, and what it has written.
    """

    method: TrainingMethod
    text: Text
    student: Student
    mixer: Mixer

    @classmethod
    def of(cls, method: TrainingMethod, text: Text, student: Student) -> "Lessons":
        """Those of a run that begins."""
        rule = Mixing(
            share=method.on_policy, adaptive=method.replay > 0, capacity=max(1, method.replay), seed=method.seed
        )
        return cls(method, text, student, Mixer(rule))

    def batch(self, step: int, part: int, total: int) -> tuple[Int[Tensor, "batch seq"], Batch]:
        """The batch of a step, counted from 0, of `total`; `part` numbers this process's batches of the step."""
        method = self.method
        number = (step * method.accumulate + part) * num_processes() + process_number()
        tokens, batch = self.text.batch(number, method.batch_size)
        source = self.mixer.choose(step, total)
        if source is Source.TEXTS:
            return tokens, batch
        if source is Source.REPLAY:
            return collate(self.mixer.replay(number, method.batch_size))
        prompts = self._prompts(tokens, batch)
        end = self.student.model.config.get("eos_token_id") if self.text.counts is not None else None
        rule = Writing(
            num_tokens=max(1, tokens.shape[1] - max(map(len, prompts))),
            end=end if isinstance(end, int) else None,
            by_student=True,
        )
        writer = writer_of(self.student.model, unpacked(self.student))
        seed = method.seed * 1_000_003 + number
        written = write([(writer, 1.0)], prompts, rule, seed)
        self.mixer.keep(written)
        return collate(written)

    def _prompts(self, tokens: Int[Tensor, "batch seq"], batch: Batch) -> list[list[int]]:
        """What the student goes on from: the prompts, or the first part of each sequence of a plain text."""
        if self.text.counts is None:
            return tokens[:, : max(1, int(_PROMPT * tokens.shape[1]))].tolist()
        first = (batch.weights.reshape(tokens.shape) > 0).int().argmax(1)  # this row is about the first taught token
        return [row[: begin + 1] for row, begin in zip(tokens.tolist(), first.tolist(), strict=True)]


def check_lessons(method: TrainingMethod, objective: Objective, *, rounds_inputs: bool) -> None:
    """Refuse losses that learn from other texts than they would get.

    Raises:
        ValueError: MiniLLM's, without texts of the student alone; a teacher that was kept on disk, with them; a student
            that rounds its inputs, which it would not do while it writes.
    """
    if num_processes() > 1 and (method.replay or method.keep_teacher):
        raise ValueError("replay and keep_teacher need one process; set them to 0, or start one process")
    if method.student_writes and method.keep_teacher:
        raise ValueError(
            "keep_teacher knows the text alone, not what the student writes; set on_policy and replay to 0"
        )
    if method.student_writes and rounds_inputs:
        raise ValueError(
            "the student rounds its inputs, but would write its texts without; set on_policy and replay to 0, or round "
            "inputs in a blocks stage after this one"
        )
    for loss in objective.predicting:
        if isinstance(loss, MiniLLM) and (method.on_policy < 1 or loss.teacher_share > 0):
            raise ValueError(
                "minillm learns from texts that the student writes alone; set on_policy: 1.0 and "
                "loss: {minillm: {teacher_share: 0}}"
            )


@torch.no_grad()
def unpacked(student: Student) -> dict[str, Tensor]:
    """Every tensor of the student as it is now, float32, as its checkpoint lays them out."""
    model = student.model
    found = {}
    for name, slot in model.slots().items():
        matrix = student.views[name](torch.float32)
        found[name] = matrix.T if slot.transposed else matrix
    for block in (*range(model.num_blocks), None):
        for name in model.others(block):
            trained = student.vectors.get(name)
            found[name] = model.tensor(name).float() if trained is None else trained(torch.float32)
    return found

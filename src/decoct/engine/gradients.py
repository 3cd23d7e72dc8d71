"""Gradients of a model's own log-likelihood, one block in memory at a time: a sweep forwards, then one backwards.

The labels are drawn from the model's predictions, so squared gradients are those of the Fisher information, the Hessian
of the divergence at zero. Hidden states and gradients lie on disk; a sweep that is stopped goes on where it was.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from decoct.arch.hf import CacheLike
from decoct.engine.activations import Activations
from decoct.engine.runner import Runner
from decoct.model import Model

LOGITS_AT_ONCE = 1 << 23
"""Entries of the logits that are held at a time."""

_LABEL_SEED = 0
_STATES, _GRADIENT = "probe", "gradient"  # names of the files


class Sweep:
    """A model, the text, and how far a sweep over its blocks has come.

    Attributes:
        runner: of the model.
    """

    def __init__(self, model: Model, tokens: Int[Tensor, "sequences length"], dtype: torch.dtype, folder: Path) -> None:
        """Describe it; nothing is run yet.

        Args:
            model: whose gradients are wanted, as it is; roundings of inputs are left out.
            tokens: the text.
            dtype: what blocks run in.
            folder: for hidden states and gradients; what an earlier process left there is taken up.
        """
        self.runner = Runner(model, dtype)
        self._model, self._tokens, self._folder = model, tokens, folder
        self._gradient = self._files(_GRADIENT)

    def reached(self, block: int) -> bool:
        """Whether the gradient by a block's input (the number of blocks: by the last one's output) is kept."""
        return self._files(_GRADIENT).path(block).exists()

    def forwards(self) -> None:
        """Save what enters each block, and what leaves the last one; nothing to do once the way back has begun."""
        model, runner, count = self._model, self.runner, len(self._tokens)
        if any(self.reached(block) for block in range(model.num_blocks + 1)):
            return
        done = [b for b in range(model.num_blocks + 1) if self._files(_STATES).path(b).exists()]
        if not done:
            states = self._files(_STATES)
            table = model.weight(model.family.embed).unpack(runner.dtype)
            states.begin()
            for row in range(count):
                states.write(row, runner.embed(self._tokens[row : row + 1], table))
            states.commit(0)
        for block in range(max(done, default=0), model.num_blocks):
            states = self._files(_STATES).resume(block)
            laid = runner.lay_out_given(block, self.given(block))
            states.begin()
            for row in range(count):
                states.write(row, runner.run(block, laid, states.read(row, row + 1)))
            states.commit(block + 1)

    def backwards(self, first: int, find: Callable[[int], None]) -> Iterator[tuple[str, int, float]]:
        """Go all the way back to the input of block `first`, or what is left of it after an interruption.

        What `find` makes of a block must be on disk when it returns: then the gradient by the block's input counts as
        done, and the block is not run again.

        Args:
            first: the last block that is run.
            find: runs a block with `through_block`.

        Yields:
            What was done, how many parts are done now, and its seconds; `last - first + 1` parts in all.
        """
        model, last = self._model, self._model.num_blocks
        done = next((block for block in range(last + 1) if self.reached(block)), last + 1)
        self.forwards()
        for block in reversed(range(first, done)):
            started = time.perf_counter()
            if block == last:
                head = model.weight(model.end_slots[-1].name).unpack(self.runner.dtype)
                for _ in self.through_head(head, _LABEL_SEED, of_head=False):
                    pass
            else:
                find(block)
            self.commit(block)
            self.discard(block)
            part = "lm_head" if block == last else f"block {block}"
            yield f"gradients, {part}", last - block + 1, time.perf_counter() - started

    def through_head(self, head: Float[Tensor, "vocab hidden"], seed: int, *, of_head: bool) -> Iterator[Tensor | None]:
        """From labels to the gradient by the last block's output; for each sequence, that by `head` if it is wanted.

        Args:
            head: the output projection, unpacked in the runner's dtype.
            seed: of the labels.
            of_head: whether the gradient by the projection is wanted.
        """
        states = self._files(_STATES).resume(self._model.num_blocks)
        at_once = max(1, LOGITS_AT_ONCE // head.shape[0])
        self._begin()
        for row in range(len(self._tokens)):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + row)
            hidden = states.read(row, row + 1)
            total = torch.zeros_like(head) if of_head else None
            for start in range(0, hidden.shape[1], at_once):
                part = slice(start, start + at_once)
                piece = hidden[:, part].clone().requires_grad_()
                leaf = head.detach().requires_grad_(of_head)
                with torch.enable_grad():
                    logits = self.runner.logits(piece, leaf)
                slope = _label_gradient(logits.detach()[0], generator).unsqueeze(0).to(logits.dtype)
                found = gradients(logits, [piece, leaf] if of_head else [piece], slope)
                hidden[:, part] = found[0]
                if total is not None:
                    total += found[1]
            self._gradient.write(row, hidden)
            yield total

    def through_block(
        self,
        block: int,
        given: Mapping[str, Tensor],
        targets: Callable[[], Sequence[Tensor]],
        cache: CacheLike | None = None,
    ) -> Iterator[list[Tensor]]:
        """From the gradient by a block's output to that by its input; for each sequence, those by `targets`.

        Args:
            block: its number.
            given: its tensors, as `given` has them.
            targets: called after each run of the block: what gradients are wanted by.
            cache: what keys and values go through.

        Raises:
            ValueError: gradients that are not finite.
        """
        states, behind = self._files(_STATES).resume(block), self.behind(block)
        self._begin()
        for row in range(len(self._tokens)):
            x = states.read(row, row + 1).requires_grad_()
            with torch.enable_grad():
                y = self.runner.run(block, self.runner.lay_out_given(block, given), x, cache)
            slope, *each = gradients(y, [x, *targets()], behind.read(row, row + 1))
            if not torch.isfinite(slope.sum()):
                raise ValueError(f"block {block}: gradients are not finite; the checkpoint or the text is damaged")
            self._gradient.write(row, slope)
            yield each

    def behind(self, block: int) -> Activations:
        """The gradient by a block's output (-1: the embedding's)."""
        return self._files(_GRADIENT).resume(block + 1)

    def commit(self, block: int) -> None:
        """Put the gradient by the input of `block` safely on disk; what lies behind the block is still there."""
        self._gradient.commit(block)

    def discard(self, block: int) -> None:
        """Remove what is kept of the output of `block`."""
        self._files(_GRADIENT).discard(block + 1)
        self._files(_STATES).discard(block + 1)

    def given(self, block: int) -> dict[str, Tensor]:
        """All of a block's tensors, unpacked, by checkpoint name."""
        model, dtype = self._model, self.runner.dtype
        names = [model.prefix(block) + slot.name for slot in model.block_slots]
        given = {name: model.weight(name).unpack(dtype) for name in names}
        return given | {name: model.tensor(name).to(dtype) for name in model.others(block)}

    def _begin(self) -> None:
        self._gradient = self._files(_GRADIENT)
        self._gradient.begin()

    def _files(self, name: str) -> Activations:
        width = self._model.shape(self._model.family.embed)[1]
        shape = (self._tokens.shape[0], self._tokens.shape[1], width)
        return Activations(self._folder, shape, self.runner.dtype, in_memory=False, name=name)


def gradients(y: Tensor, inputs: Sequence[Tensor], slope: Tensor) -> list[Tensor]:
    """Gradients by these inputs; zero by those that were not used, as an expert's that no token went to."""
    found: tuple[Tensor | None, ...] = torch.autograd.grad(y, list(inputs), slope, allow_unused=True)
    return [torch.zeros_like(x) if each is None else each for x, each in zip(inputs, found, strict=True)]


def _label_gradient(logits: Float[Tensor, "tokens vocab"], generator: torch.Generator) -> Float[Tensor, "tokens vocab"]:
    """Gradient of the negative log-likelihood of labels that these logits themselves draw, one a token, float32."""
    chances = torch.softmax(logits.float(), dim=-1)
    labels = torch.multinomial(chances, 1, generator=generator)
    return chances.scatter_add_(1, labels, torch.full(labels.shape, -1.0))

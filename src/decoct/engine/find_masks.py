"""Masks on neurons and heads that are learned on the whole model, held to a shape by Lagrange multipliers."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from decoct.engine.find_information import Information
from decoct.engine.narrow import NarrowModel, Trunk, trunks
from decoct.engine.runner import Runner
from decoct.engine.stream import Event, OnEvent
from decoct.losses import Batch, CrossEntropy, Head, Projected
from decoct.methods.prune.sheared_llama import ShearedLLaMA
from decoct.model import Model
from decoct.ops.hard_concrete import draw_mask, open_chance
from decoct.store import open_safetensors, save_safetensors

_FILE = "masks.safetensors"
_FIRST = 2.0  # logits at first: all masks are likely open
_PULL = 10.0  # rate of the multipliers, in rates of the logits
_BETAS, _EPS = (0.9, 0.95), 1e-12
_SAVE_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Masking:
    """Everything that learning masks needs.

    Attributes:
        becomes: the model, and how much of it stays.
        tokens: calibration.
        dtype: what blocks run in.
        folder: for what is found.
        on_event: told of every step.
    """

    becomes: NarrowModel
    tokens: Int[Tensor, "sequences length"]
    dtype: torch.dtype
    folder: Path
    on_event: OnEvent

    @property
    def method(self) -> ShearedLLaMA:
        """Settings."""
        method = self.becomes.method
        assert isinstance(method, ShearedLLaMA)
        return method


def find_masks(todo: Masking) -> Information:
    """Learn the masks' logits, or go on where an earlier process stopped.

    Raises:
        ValueError: a loss that is not finite.
    """
    masks, method = _Masks(todo), todo.method
    saved = time.perf_counter()
    network = _Network(todo) if masks.step < method.num_steps else None
    while masks.step < method.num_steps:
        assert network is not None
        begun = time.perf_counter()
        loss = masks.learn(network)
        now = time.perf_counter()
        todo.on_event(Event(f"step {masks.step}", masks.step, method.num_steps, None, now - begun, 0, loss=loss))
        if now - saved > _SAVE_SECONDS or masks.step == method.num_steps:
            masks.save()
            saved = now
    return [{edge: logits[block] for edge, logits in masks.logits.items()} for block in range(todo.becomes.num_blocks)]


class _Masks:
    """Masks under way.

    Attributes:
        logits: by edge, [blocks, units].
        step: how many steps are done.
    """

    def __init__(self, todo: Masking) -> None:
        self._todo, self._path = todo, todo.folder / _FILE
        blocks = todo.becomes.num_blocks
        self._trunks = trunks(todo.becomes.base, todo.method)
        self.logits = {trunk.edge: torch.full((blocks, trunk.num_units), _FIRST) for trunk in self._trunks}
        self._pulls = {trunk.edge: torch.zeros(blocks, 2) for trunk in self._trunks}
        self.step, self._moments = 0, {name: torch.zeros_like(each) for name, each in self._named("mean", "square")}
        if self._path.exists():
            self._restore()

    @torch.enable_grad()
    def learn(self, network: "_Network") -> float:
        """Move masks and multipliers once; gives the text's loss."""
        method, tokens = self._todo.method, self._todo.tokens
        generator = torch.Generator().manual_seed(method.seed * 1_000_003 + self.step)
        rows = torch.randint(len(tokens), (method.batch_size,), generator=generator)
        logits = {edge: each.clone().requires_grad_(True) for edge, each in self.logits.items()}
        pulls = {edge: each.clone().requires_grad_(True) for edge, each in self._pulls.items()}
        masks = {edge: draw_mask(each, torch.rand(each.shape, generator=generator)) for edge, each in logits.items()}
        loss = network.loss(tokens[rows], masks)
        total = loss
        for trunk in self._trunks:
            wanted = method.wanted(self.step, trunk.num_units, self._todo.becomes.kept(trunk))
            off = open_chance(logits[trunk.edge]).mean(1) - wanted
            total = total + (pulls[trunk.edge] * torch.stack([off, off.square()], 1)).sum()
        total.backward()  # type: ignore[no-untyped-call]
        self.step += 1
        for edge, each in logits.items():
            self._move(f"logits:{edge}", self.logits[edge], each.grad, method.learning_rate)
        for edge, each in pulls.items():
            self._move(f"pulls:{edge}", self._pulls[edge], each.grad, -_PULL * method.learning_rate)
        return float(loss.detach())

    def save(self) -> None:
        """Write down everything that a later process needs."""
        tensors = {name.removeprefix("value:"): each for name, each in self._named("value")} | self._moments
        save_safetensors(self._path, tensors, {"step": str(self.step)})

    def _named(self, *kinds: str) -> list[tuple[str, Tensor]]:
        """All tensors, under the names of each of these kinds."""
        own = [("logits", self.logits), ("pulls", self._pulls)]
        return [
            (f"{kind}:{name}:{edge}", each) for kind in kinds for name, group in own for edge, each in group.items()
        ]

    @torch.no_grad()
    def _move(self, name: str, tensor: Tensor, gradient: Tensor | None, rate: float) -> None:
        """Adam (arXiv 1412.6980); upwards where the rate is negative."""
        assert gradient is not None
        mean, square = self._moments[f"mean:{name}"], self._moments[f"square:{name}"]
        mean.lerp_(gradient, 1.0 - _BETAS[0])
        square.lerp_(gradient.square(), 1.0 - _BETAS[1])
        fade = [1.0 - beta**self.step for beta in _BETAS]
        tensor.sub_(rate * (mean / fade[0]) / ((square / fade[1]).sqrt() + _EPS))

    def _restore(self) -> None:
        saved = open_safetensors(self._path)
        self.step = int(saved.metadata["step"])
        for name, each in self._named("value"):
            each.copy_(saved.read(name.removeprefix("value:")))
        for name, each in self._moments.items():
            each.copy_(saved.read(name))


class _Network:
    """The whole model, unpacked, whose readers' columns are multiplied with masks."""

    def __init__(self, todo: Masking) -> None:
        model, dtype = todo.becomes.base, todo.dtype
        self._model, self._trunks = model, trunks(model, todo.method)
        self._runner = Runner(model, dtype)
        self._ends = {slot.name: model.weight(slot.name).unpack(dtype) for slot in model.end_slots}
        self._blocks = [self._matrices(model, block, dtype) for block in range(model.num_blocks)]

    def loss(
        self, tokens: Int[Tensor, "batch seq"], masks: Mapping[str, Float[Tensor, "blocks units"]]
    ) -> Float[Tensor, ""]:
        """Cross-entropy of the next tokens, differentiable by the masks."""
        model = self._model
        hidden = self._runner.embed(tokens, self._ends[model.family.embed])
        for block in range(model.num_blocks):
            own = {edge: each[block] for edge, each in masks.items()}
            hidden = checkpoint(partial(self._run, block), hidden, own, use_reentrant=False, preserve_rng_state=False)
        final = self._runner.final(hidden)
        cap = model.config.get("final_logit_softcapping")
        head = Head(self._ends[model.end_slots[-1].name], softcap=None if cap is None else float(cap))
        return CrossEntropy()(Projected(final.flatten(0, 1), head), None, Batch.of(tokens))

    def _run(self, block: int, hidden: Tensor, masks: Mapping[str, Float[Tensor, " units"]]) -> Tensor:
        given, prefix = dict(self._blocks[block]), self._model.prefix(block)
        for trunk in self._trunks:
            name = prefix + trunk.reader.name
            given[name] = given[name] * _by_channel(trunk, masks[trunk.edge]).to(hidden.dtype)
        return self._runner.run(block, self._runner.lay_out_given(block, given), hidden)

    @staticmethod
    def _matrices(model: Model, block: int, dtype: torch.dtype) -> dict[str, Tensor]:
        names = [model.prefix(block) + slot.name for slot in model.block_slots]
        found = {name: model.weight(name).unpack(dtype) for name in names}
        return found | {name: model.tensor(name).to(dtype) for name in model.others(block)}


def _by_channel(trunk: Trunk, mask: Float[Tensor, " units"]) -> Float[Tensor, " channels"]:
    return mask.repeat_interleave(trunk.unit)

"""The only hooks: statistics of what a block's matrices read, gathered while it runs."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from decoct.arch import Edge, Slot
from decoct.arch.hf import expert_answers, expert_inputs
from decoct.methods.experts import ExpertStat
from decoct.methods.guided import ByGroup, GroupedMoments
from decoct.stats import PairedGram

Wanted = Mapping[str, frozenset[Any]]
"""Kinds of statistic wanted, by edge."""

Gathered = dict[str, dict[Any, Any]]


@dataclass(slots=True)
class Recorder:
    """What the hooks write to.

    Attributes:
        stats: by edge and kind.
        kept: inputs of the uncompressed model by edge, waiting for those of the compressed one.
        keeping: whether the next runs are of the uncompressed model.
        weights: what the tokens of the batch that is run next weigh in each group of a slot's output features,
            [tokens, groups] by the slot's name; of slots whose statistics are guided.
    """

    stats: Gathered
    kept: dict[str, Tensor] = field(default_factory=dict)
    keeping: bool = False
    weights: Mapping[str, Tensor] = field(default_factory=dict)

    @contextmanager
    def uncompressed(self) -> Iterator[None]:
        """The body runs a batch as the uncompressed model sees it; the same batch as it is now must follow."""
        self.keeping = True
        try:
            yield
        finally:
            self.keeping = False

    def take(self, edge: str, x: Tensor) -> None:
        """Inputs [..., in] of an edge."""
        x = x.reshape(-1, x.shape[-1])
        stats = self.stats[edge]
        if self.keeping:
            if any(PairedGram in (kind, kind.kind if isinstance(kind, ByGroup) else None) for kind in stats):
                self.kept[edge] = x
            return
        original = self.kept.pop(edge, None)
        for kind, stat in stats.items():
            if isinstance(stat, GroupedMoments):
                stat.add_weighted(x, self.weights[kind.slot], original)
            elif isinstance(stat, PairedGram) and original is not None:
                stat.add_pair(x, original)
            else:
                stat.add(x)


@contextmanager
def record(
    module: nn.Module, edges: Mapping[str, Edge], wanted: Wanted, widths: Mapping[str, int], paths: Mapping[str, str]
) -> Iterator[Recorder]:
    """Gather statistics of every wanted edge while the body runs the module.

    Args:
        module: the block (or output projection) that will be called.
        edges: its edges.
        wanted: which of them, and which kinds.
        widths: features of each edge.
        paths: where in the module each reader slot's parameter lives, by slot name, e.g. "mlp.down_proj".
    """
    stats: Gathered = {edge: {kind: kind.empty(widths[edge]) for kind in kinds} for edge, kinds in wanted.items()}
    recorder = Recorder(stats)
    takes: list[tuple[str, Any]] = []
    by_experts: dict[str, list[Edge]] = {}
    for name in wanted:
        reader = edges[name].readers[0]
        if reader.expert is None:
            takes.append((paths[reader.name], partial(_take_input, recorder, name)))
        else:
            by_experts.setdefault(paths[reader.name], []).append(edges[name])
    takes += [(path, partial(_take_expert_inputs, recorder, found)) for path, found in by_experts.items()]
    with _hooked(module.get_submodule(path).register_forward_pre_hook(take) for path, take in takes):
        yield recorder


@contextmanager
def record_answers(module: nn.Module, path: str, stat: ExpertStat | None) -> Iterator[None]:
    """Note what a block's experts answer while the body runs the block.

    Args:
        module: the block that will be called.
        path: where in it the experts lie.
        stat: what takes the answers; None: nothing is noted.
    """
    if stat is None:
        yield
        return
    with _hooked([module.get_submodule(path).register_forward_pre_hook(partial(_take_answers, stat))]):
        yield


@contextmanager
def record_outputs(module: nn.Module, paths: Mapping[str, str]) -> Iterator[dict[str, Tensor]]:
    """While the body runs the module, keep what some of its layers put out last, as part of the graph of gradients.

    Args:
        module: the block that will be called.
        paths: where in it each layer lies, by a name of one's own.
    """
    found: dict[str, Tensor] = {}
    layers = {name: module.get_submodule(path) for name, path in paths.items()}
    with _hooked(each.register_forward_hook(partial(_keep_output, found, name)) for name, each in layers.items()):
        yield found


@contextmanager
def record_inputs(module: nn.Module, paths: Mapping[str, str]) -> Iterator[dict[str, Tensor]]:
    """While the body runs the module, keep what some of its layers read last.

    Args:
        module: the block that will be called.
        paths: where in it each layer lies, by a name of one's own.
    """
    found: dict[str, Tensor] = {}
    layers = {name: module.get_submodule(path) for name, path in paths.items()}
    with _hooked(each.register_forward_pre_hook(partial(_keep_input, found, name)) for name, each in layers.items()):
        yield found


@contextmanager
def _hooked(registering: Iterable[RemovableHandle]) -> Iterator[None]:
    """Register hooks, and take them away after the body."""
    hooks: list[RemovableHandle] = []
    try:
        hooks.extend(registering)
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _keep_input(found: dict[str, Tensor], name: str, _: nn.Module, arguments: tuple[Tensor, ...]) -> None:
    found[name] = arguments[0]


def _keep_output(found: dict[str, Tensor], name: str, _: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
    found[name] = output


def _take_input(recorder: Recorder, edge: str, _: nn.Module, arguments: tuple[Tensor, ...]) -> None:
    recorder.take(edge, arguments[0])


def _take_expert_inputs(
    recorder: Recorder, found: list[Edge], experts: nn.Module, arguments: tuple[Tensor, ...]
) -> None:
    if recorder.keeping:
        return  # the two models may send a token to different experts: planning refuses paired statistics here
    cache: dict[int, tuple[Tensor, Tensor]] = {}
    for edge in found:
        reader = edge.readers[0]
        assert reader.expert is not None
        if reader.expert not in cache:
            cache[reader.expert] = expert_inputs(experts, arguments, reader.expert)
        x = cache[reader.expert][0 if _reads_hidden(reader) else 1]
        recorder.take(edge.name, x)


def _take_answers(stat: ExpertStat, experts: nn.Module, arguments: tuple[Tensor, ...]) -> None:
    hidden, chosen, weights = arguments
    for expert in range(len(stat.num_sent)):
        picked = chosen == expert
        sent, gates = picked.any(-1), (weights * picked).sum(-1)
        stat.num_sent[expert] += sent.sum()
        asked = torch.ones_like(sent) if stat.everywhere else sent
        if asked.any():
            stat.add(expert, expert_answers(experts, hidden[asked], expert), gates[asked])


def _reads_hidden(slot: Slot) -> bool:
    """Gate and up read the hidden states; down reads the product of both."""
    return slot.half is not None

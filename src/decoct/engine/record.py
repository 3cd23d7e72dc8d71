"""The only hooks: statistics of what a block's matrices read, gathered while it runs."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from decoct.arch import Edge, Slot
from decoct.arch.hf import expert_inputs
from decoct.stats import PairedGram

Wanted = Mapping[str, frozenset[type[Any]]]
"""Kinds of statistic wanted, by edge."""

Gathered = dict[str, dict[type[Any], Any]]


@dataclass(slots=True)
class Recorder:
    """What the hooks write to.

    Attributes:
        stats: by edge and kind.
        kept: inputs of the uncompressed model by edge, waiting for those of the compressed one.
        keeping: whether the next runs are of the uncompressed model.
    """

    stats: Gathered
    kept: dict[str, Tensor] = field(default_factory=dict)
    keeping: bool = False

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
            if PairedGram in stats:
                self.kept[edge] = x
            return
        original = self.kept.pop(edge, None)
        for stat in stats.values():
            if isinstance(stat, PairedGram) and original is not None:
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
    hooks = []
    try:
        by_experts: dict[str, list[Edge]] = {}
        for name in wanted:
            reader = edges[name].readers[0]
            if reader.expert is None:
                target = module.get_submodule(paths[reader.name])
                hooks.append(target.register_forward_pre_hook(partial(_take_input, recorder, name)))
            else:
                by_experts.setdefault(paths[reader.name], []).append(edges[name])
        for path, found in by_experts.items():
            target = module.get_submodule(path)
            hooks.append(target.register_forward_pre_hook(partial(_take_expert_inputs, recorder, found)))
        yield recorder
    finally:
        for hook in hooks:
            hook.remove()


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


def _reads_hidden(slot: Slot) -> bool:
    """Gate and up read the hidden states; down reads the product of both."""
    return slot.half is not None

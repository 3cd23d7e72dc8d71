"""The only hooks: statistics of what a block's matrices read, gathered while it runs."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from decoct.arch import Edge, Slot
from decoct.arch.hf import expert_inputs

Wanted = Mapping[str, frozenset[type[Any]]]
"""Kinds of statistic wanted, by edge."""

Gathered = dict[str, dict[type[Any], Any]]


@contextmanager
def record(
    module: nn.Module, edges: Mapping[str, Edge], wanted: Wanted, widths: Mapping[str, int], paths: Mapping[str, str]
) -> Iterator[Gathered]:
    """Gather statistics of every wanted edge while the body runs the module.

    Args:
        module: the block (or output projection) that will be called.
        edges: its edges.
        wanted: which of them, and which kinds.
        widths: features of each edge.
        paths: where in the module each reader slot's parameter lives, by slot name, e.g. "mlp.down_proj".
    """
    gathered: Gathered = {edge: {kind: kind.empty(widths[edge]) for kind in kinds} for edge, kinds in wanted.items()}
    hooks = []
    try:
        by_experts: dict[str, list[Edge]] = {}
        for name in wanted:
            reader = edges[name].readers[0]
            if reader.expert is None:
                target = module.get_submodule(paths[reader.name])
                hooks.append(target.register_forward_pre_hook(partial(_add_input, gathered[name])))
            else:
                by_experts.setdefault(paths[reader.name], []).append(edges[name])
        for path, found in by_experts.items():
            target = module.get_submodule(path)
            hooks.append(target.register_forward_pre_hook(partial(_add_expert_inputs, gathered, found)))
        yield gathered
    finally:
        for hook in hooks:
            hook.remove()


def _add_input(stats: dict[type[Any], Any], _: nn.Module, arguments: tuple[Tensor, ...]) -> None:
    x = arguments[0]
    for stat in stats.values():
        stat.add(x.reshape(-1, x.shape[-1]))


def _add_expert_inputs(
    gathered: Gathered, found: list[Edge], experts: nn.Module, arguments: tuple[Tensor, ...]
) -> None:
    cache: dict[int, tuple[Tensor, Tensor]] = {}
    for edge in found:
        reader = edge.readers[0]
        assert reader.expert is not None
        if reader.expert not in cache:
            cache[reader.expert] = expert_inputs(experts, arguments, reader.expert)
        x = cache[reader.expert][0 if _reads_hidden(reader) else 1]
        for stat in gathered[edge.name].values():
            stat.add(x)


def _reads_hidden(slot: Slot) -> bool:
    """Gate and up read the hidden states; down reads the product of both."""
    return slot.half is not None

"""What refitting the sublayers before gaps will take, and whether a model allows it."""

import torch

from decoct.engine.budget import product_rate
from decoct.engine.data import Data
from decoct.engine.runner import block_nbytes
from decoct.methods.depth import Cut, DepthMethod
from decoct.model import Model

CHAINS = 2
"""Of hidden states: of the whole model, and of what is left of it."""

COPIES = 4
"""Of a chain's hidden states that are on disk at most: two of either chain, or one of them and three of the other."""

_FLOAT32 = 4  # bytes


def check_bridge(model: Model, method: DepthMethod) -> None:
    """Refuse a model whose sublayers do not end in a dense matrix that writes the residual stream.

    Raises:
        ValueError: why not, and what to do.
    """
    roles = _roles(model, method)
    slots = [slot for slot in model.block_slots if slot.role in roles and slot.writes == "resid"]
    if len(slots) < len(roles):
        raise ValueError(f"a {model.family.name} block has no single MLP to refit; leave bridge out")
    try:
        model.family.stream(model.config)
    except ValueError:
        raise ValueError(
            f"a norm stands between a {model.family.name} block's MLP and the residual stream; leave bridge out"
        ) from None
    for block in range(model.num_blocks):
        if any(model.prefix(block) + slot.name in model.described for slot in slots):
            raise ValueError("a bridge refits dense matrices, and these are compressed already; leave bridge out")
    most = min(min(shape) for shape in _shapes(model, method))
    if method.bridge_rank is not None and method.bridge_rank > most:
        raise ValueError(
            f"bridge is {method.bridge_rank}, and a matrix that it would change has rank {most} at most; set it to "
            "less, or to true"
        )


def bridge_bytes(model: Model, method: DepthMethod, data: Data, dtype: torch.dtype, *, in_memory: bool) -> int:
    """Memory that refitting takes beside a block and a batch: another block, one least-squares problem, what is found.

    Args:
        model: what the stage begins with.
        method: settings.
        data: calibration.
        dtype: what blocks run in.
        in_memory: count the two chains of hidden states, too.
    """
    solving = max(_FLOAT32 * (4 * width * width + 4 * width * out) for out, width in _shapes(model, method))
    if method.bridge_rank is not None:  # in float64: what the outputs explain, its eigenvectors, and copies
        solving += max(2 * _FLOAT32 * (6 * out * out + 2 * out * width) for out, width in _shapes(model, method))
    entries = max(out * width for out, width in _shapes(model, method))
    found = len(method.guess(model.num_blocks)) * entries * model.dtype.itemsize
    states = CHAINS * states_bytes(model, data, dtype) if in_memory else 0
    return states + solving + found + block_nbytes(model) * dtype.itemsize // model.dtype.itemsize


def states_bytes(model: Model, data: Data, dtype: torch.dtype) -> int:
    """Bytes of the hidden states of all calibration text."""
    return data.num_tokens * model.shape(model.family.embed)[1] * dtype.itemsize


def bridge_seconds(model: Model, method: DepthMethod, data: Data, dtype: torch.dtype) -> float:
    """The two chains' runs over all text, and for each gap another run of a block or two, sums and a factorization."""
    gaps = len(method.guess(model.num_blocks))
    passes = CHAINS + 2 * gaps / model.num_blocks
    running = 2.0 * model.num_parameters * data.num_tokens * passes / (0.4 * product_rate(dtype))
    sums = max(width * width + 2 * out * width for out, width in _shapes(model, method)) * data.num_tokens
    solving = max(width**3 + 2 * width * width * out for out, width in _shapes(model, method))
    return float(running + gaps * (sums + solving) / (0.4 * product_rate(torch.float32)))


def _shapes(model: Model, method: DepthMethod) -> list[tuple[int, int]]:
    """(out, in) of the matrices that may be refitted."""
    roles, prefix = _roles(model, method), model.prefix(0)
    found = [model.shape(prefix + slot.name) for slot in model.block_slots if slot.role in roles]
    return [(out, width) for out, width in found]


def _roles(model: Model, method: DepthMethod) -> set[str]:
    """Of the matrices that may be refitted: attention's too where a block may lose its MLP alone."""
    parts = any(cut != Cut(cut.block) for cut in method.guess(model.num_blocks))
    return {"mlp.down", "attn.o"} if parts else {"mlp.down"}

"""Opening a checkpoint as a network: decoct's own decode loop, or transformers."""

import torch

from decoct.model import Model
from decoct.runtime.anatomy import slow_because
from decoct.runtime.decoder import Decoder
from decoct.runtime.network import Network

_USUAL_CONTEXT = 4096


def choose_context(model: Model, wanted: int | None) -> int:
    """The context to prepare: what is wanted, else the model's own up to 4096.

    Raises:
        ValueError: the model was not made for so many.
    """
    limit = model.max_length
    if wanted is None:
        return min(limit or _USUAL_CONTEXT, _USUAL_CONTEXT)
    if limit is not None and wanted > limit:
        raise ValueError(f"context {wanted} is more than the model's limit of {limit} tokens; use --context {limit}")
    return wanted


def open_network(
    model: Model, engine: str, *, context: int, num_seats: int = 1, dtype: torch.dtype | None = None
) -> Network:
    """Load a checkpoint.

    Args:
        model: what to run.
        engine: "decoct", which leaves to transformers what its loop does not know, "decoct-int8", the same with prompts
            rounded to 8 bits, or "transformers".
        context: the most tokens that a sequence may have.
        num_seats: sequences at once.
        dtype: of hidden states; None: the model's own.

    Raises:
        ValueError: the checkpoint is incomplete.
    """
    reason = slow_because(model) if engine.startswith("decoct") else ""
    if reason is None:
        rounded = engine == "decoct-int8"
        return Decoder(model, context=context, num_seats=num_seats, dtype=dtype, rounded_prompts=rounded)
    from decoct.hf import TransformersNetwork, load_whole

    about = f"transformers, since {reason}" if reason else "transformers"
    return TransformersNetwork(load_whole(model, dtype), model, about, context=context, num_seats=num_seats)

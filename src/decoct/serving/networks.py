"""Opening a checkpoint as a network: decoct's own decode loop, or transformers."""

import torch

from decoct.engine.budget import format_size
from decoct.model import Model
from decoct.runtime.anatomy import slow_because
from decoct.runtime.decoder import Decoder
from decoct.runtime.kernels.gpu import gpu_kernels
from decoct.runtime.network import Network

GPU = "cuda"
"""The engine, and torch's name of the device, NVIDIA's and AMD's alike."""

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
            rounded to 8 bits, "transformers", or "cuda": transformers on a GPU.
        context: the most tokens that a sequence may have.
        num_seats: sequences at once.
        dtype: of hidden states; None: the model's own.

    Raises:
        ValueError: the checkpoint is incomplete, or there is no GPU for "cuda".
    """
    if engine == GPU:
        check_gpu()
    reason = slow_because(model) if engine.startswith("decoct") else ""
    if reason is None:
        rounded = engine == "decoct-int8"
        return Decoder(model, context=context, num_seats=num_seats, dtype=dtype, rounded_prompts=rounded)
    from decoct.hf import TransformersNetwork, load_whole

    about = f"transformers, since {reason}" if reason else "transformers"
    if engine == GPU:
        about = f"transformers on {torch.cuda.get_device_name()}, {gpu_kernels()}"
    try:
        network = load_whole(model, dtype, GPU if engine == GPU else None)
    except torch.OutOfMemoryError:
        free = torch.cuda.mem_get_info()[0]
        raise ValueError(
            f"{model.source.label} does not fit in the {format_size(free)} that are free on the GPU; compress it "
            "further, or use --engine decoct"
        ) from None
    return TransformersNetwork(network, model, about, context=context, num_seats=num_seats)


def check_gpu() -> None:
    """Refuse to go on without a GPU.

    Raises:
        ValueError: torch sees none.
    """
    if not torch.cuda.is_available():
        raise ValueError(
            f"the engine cuda needs a GPU, and torch {torch.__version__} sees none; use --engine decoct, or install a "
            "torch for your GPU (pytorch.org/get-started)"
        )

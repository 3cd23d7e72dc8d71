"""The engines by name."""

from contextlib import ExitStack
from difflib import get_close_matches
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from decoct.exporters import export_model
from decoct.model import open_model
from decoct.serving.engine import Engine
from decoct.serving.exported import open_exported
from decoct.serving.llama_cpp import LlamaCpp
from decoct.serving.network_engine import NetworkEngine
from decoct.serving.networks import choose_context, open_network

ENGINES = ("decoct", "decoct-int8", "transformers", "cuda", "llama.cpp", "onnxruntime", "openvino")
"""As `--engine` spells them. "decoct-int8" rounds what a prompt's tokens are multiplied with to 8 bits; "cuda" is
transformers on a GPU, with weights packed there too."""

_LLAMA_CONTEXT = 4096


def check_engine(name: str) -> None:
    """Refuse an engine that there is not.

    Raises:
        ValueError: its name is unknown; the nearest is named.
    """
    if name not in ENGINES:
        close = get_close_matches(name, ENGINES, n=1, cutoff=0.4)
        hint = f"; did you mean {close[0]}?" if close else f"; known: {', '.join(ENGINES)}"
        raise ValueError(f"unknown engine {name!r}{hint}")


def open_engine(
    name: str,
    model: str | Path,
    *,
    context: int | None = None,
    num_seats: int = 1,
    dtype: torch.dtype | None = None,
) -> Engine:
    """Load a checkpoint into an engine.

    Args:
        name: one of ENGINES.
        model: folder, .gguf file, or hub id.
        context: the most tokens that prompt and answer may have together; None: the model's own up to 4096.
        num_seats: sequences to hold at once.
        dtype: of hidden states; None: the model's own.

    Raises:
        ValueError: the engine is unknown, not installed, or cannot run the checkpoint.
    """
    check_engine(name)
    if context is not None and context < 2:
        raise ValueError(f"context {context} is too short; give at least 2 tokens")
    if name == "llama.cpp":
        return _llama_cpp(model, context)
    if name in ("onnxruntime", "openvino"):
        return open_exported(name, model, context=context, num_seats=num_seats)
    opened = open_model(model)
    room = choose_context(opened, context)
    return NetworkEngine(name, opened, open_network(opened, name, context=room, num_seats=num_seats, dtype=dtype))


def _llama_cpp(model: str | Path, context: int | None) -> Engine:
    """A .gguf file as it is; another checkpoint written as one first, in a folder that goes with the engine."""
    if Path(model).suffix == ".gguf":
        return LlamaCpp(Path(model), context=context or _LLAMA_CONTEXT)
    opened = open_model(model)
    room = choose_context(opened, context)
    with ExitStack() as unfinished:
        path = Path(unfinished.enter_context(TemporaryDirectory(prefix="decoct-"))) / "model.gguf"
        export_model(opened, "gguf", path, load=False)
        engine = LlamaCpp(path, context=room)
        engine.remove = unfinished.pop_all().close
    return engine

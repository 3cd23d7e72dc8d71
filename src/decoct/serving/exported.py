"""The engines onnxruntime and OpenVINO: run folders that were exported for them, tokens drawn by decoct."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from decoct.arch import find_family
from decoct.exporters import export_model
from decoct.exporters.in_onnxruntime import OnnxDecoder
from decoct.exporters.in_openvino import GRAPH, OpenVinoDecoder
from decoct.exporters.onnx import GENAI
from decoct.model import Model, open_model
from decoct.runtime.network import Feed
from decoct.serving.network_engine import NetworkEngine
from decoct.serving.networks import choose_context
from decoct.store import FolderSource, read_json

_FORMATS = {"onnxruntime": ("onnx", GENAI), "openvino": ("openvino", GRAPH)}
"""The format that an engine runs, and a file by which such a folder is known."""


class Decoder(Protocol):
    """What runs a folder, a sequence in each seat.

    Attributes:
        context: the most tokens that a sequence may have.
        num_seats: sequences that it holds at once.
        nbytes: of the weights, as they lie in the folder.
    """

    context: int
    num_seats: int
    nbytes: int

    def advance(self, seat: int, tokens: Sequence[int]) -> Float[Tensor, " vocab"]:
        """Take tokens in; gives the logits after the last one."""

    def length(self, seat: int) -> int:
        """Tokens that a sequence has so far."""

    def release(self, seat: int) -> None:
        """Forget a sequence."""


class ExportedNetwork:
    """A `Network` of one sequence after another.

    Attributes:
        about: one line: what computes.
        context: the most tokens that a sequence may have.
        num_seats: sequences that it holds at once.
        nbytes: of the weights, as they lie in the folder.
    """

    def __init__(self, about: str, decoder: Decoder) -> None:
        self.about, self._decoder = about, decoder
        self.context, self.num_seats, self.nbytes = decoder.context, decoder.num_seats, decoder.nbytes

    def advance(self, feeds: Sequence[Feed]) -> Float[Tensor, "feeds vocab"]:
        """Take tokens in; gives the float32 logits after the last token of each feed."""
        return torch.stack([self._decoder.advance(feed.seat, feed.tokens) for feed in feeds])

    def length(self, seat: int) -> int:
        """Tokens that a sequence has so far."""
        return self._decoder.length(seat)

    def release(self, seat: int) -> None:
        """Forget a sequence."""
        self._decoder.release(seat)


def open_exported(engine: str, model: str | Path, *, context: int | None, num_seats: int) -> NetworkEngine:
    """A folder of the engine's format as it is; another checkpoint written as one first, into a temporary folder.

    Args:
        engine: "onnxruntime" or "openvino".
        model: such a folder, or any checkpoint.
        context: the most tokens that prompt and answer may have together; None: the model's own up to 4096.
        num_seats: sequences to hold at once.

    Raises:
        ValueError: the engine's package is missing, or the checkpoint cannot be written for it, or is not loaded.
    """
    form, mark = _FORMATS[engine]
    folder = Path(model)
    with ExitStack() as unfinished:
        if (folder / mark).is_file():
            opened = _read(folder)
            room = choose_context(opened, context)
        else:
            opened = open_model(model)
            room = choose_context(opened, context)
            folder = Path(unfinished.enter_context(TemporaryDirectory(prefix="decoct-")))
            export_model(opened, form, folder, load=False)
        network = ExportedNetwork(engine, _start(engine, folder, room, num_seats))
        return NetworkEngine(engine, opened, network, unfinished.pop_all().close)


def _start(engine: str, folder: Path, context: int, num_seats: int) -> Decoder:
    if engine == "onnxruntime":
        return OnnxDecoder(folder, context=context, num_seats=num_seats)
    return OpenVinoDecoder(folder, context=context, num_seats=num_seats)


def _read(folder: Path) -> Model:
    """Such a folder as a model without tensors: its config and its tokenizer."""
    config = read_json(folder / "config.json")
    return Model(FolderSource(folder, config, {}, ()), find_family(config))

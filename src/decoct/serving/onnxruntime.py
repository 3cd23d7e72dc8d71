"""The engine onnxruntime: runs a folder that was exported to ONNX, tokens drawn by decoct."""

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from decoct.exporters.in_onnxruntime import OnnxDecoder
from decoct.runtime.network import Feed


class OnnxNetwork:
    """A `Network` of one sequence after another.

    Attributes:
        about: one line: what computes.
        context: the most tokens that a sequence may have.
        num_seats: sequences that it holds at once.
    """

    about = "onnxruntime"

    def __init__(self, folder: Path, *, context: int, num_seats: int) -> None:
        """Load a folder.

        Raises:
            ValueError: onnxruntime is missing, or does not load the folder.
        """
        self._decoder = OnnxDecoder(folder, context=context, num_seats=num_seats)
        self.context, self.num_seats, self.nbytes = context, num_seats, self._decoder.nbytes

    def advance(self, feeds: Sequence[Feed]) -> Float[Tensor, "feeds vocab"]:
        """Take tokens in; gives the float32 logits after the last token of each feed."""
        return torch.stack([self._decoder.advance(feed.seat, feed.tokens) for feed in feeds])

    def length(self, seat: int) -> int:
        """Tokens that a sequence has so far."""
        return self._decoder.length(seat)

    def release(self, seat: int) -> None:
        """Forget a sequence."""
        self._decoder.release(seat)

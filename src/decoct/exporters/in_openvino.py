"""OpenVINO's CPU plugin, run on a folder that was written: a request with its own keys and values for each seat."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

GRAPH = "openvino_model.xml"
"""Its name in a folder; constants lie beside it in openvino_model.bin."""

_TOKENS_AT_ONCE = 512  # of a prompt


class OpenVinoDecoder:
    """A decoder that computes in float32.

    Attributes:
        context: the most tokens that a sequence may have.
        num_seats: sequences that it holds at once.
        nbytes: of the weights, as they lie in the folder.
    """

    def __init__(self, folder: Path, *, context: int, num_seats: int = 1, rounded: bool = True) -> None:
        """Load.

        Args:
            folder: as `decoct export --to openvino` writes it.
            context: the most tokens that a sequence may have.
            num_seats: sequences to hold at once.
            rounded: inputs of packed matrices may be rounded to 8 bits, as the plugin does unless it is told not to.

        Raises:
            ValueError: openvino is missing, or does not load the folder.
        """
        self.context, self.num_seats = context, num_seats
        compiled = _compiled(folder / GRAPH, rounded=rounded)
        self.nbytes = (folder / GRAPH).with_suffix(".bin").stat().st_size
        self._requests = [compiled.create_infer_request() for _ in range(num_seats)]
        self._lengths = [0] * num_seats

    def length(self, seat: int) -> int:
        """Tokens that a sequence has so far."""
        return self._lengths[seat]

    def release(self, seat: int) -> None:
        """Forget a sequence."""
        self._lengths[seat] = 0
        self._requests[seat].reset_state()

    def advance(self, seat: int, tokens: Sequence[int]) -> Float[Tensor, " vocab"]:
        """Take tokens in, long prompts by pieces; gives the logits after the last one."""
        found = torch.empty(0)
        for start in range(0, len(tokens), _TOKENS_AT_ONCE):
            found = self._run(seat, tokens[start : start + _TOKENS_AT_ONCE])
        return found

    def _run(self, seat: int, tokens: Sequence[int]) -> Float[Tensor, " vocab"]:
        import numpy as np

        before = self._lengths[seat]
        total = before + len(tokens)
        assert total <= self.context, "the caller counts tokens"
        found = self._requests[seat].infer(
            {
                "input_ids": np.array([tokens], dtype=np.int64),
                "attention_mask": np.ones((1, total), dtype=np.int64),
                "position_ids": np.arange(before, total, dtype=np.int64)[None],
                "beam_idx": np.zeros(1, dtype=np.int32),
            }
        )
        self._lengths[seat] = total
        return torch.from_numpy(found["logits"][0, -1].copy())


def _compiled(path: Path, *, rounded: bool) -> Any:
    try:
        import openvino
    except ImportError:
        raise ValueError("running OpenVINO needs its package: pip install 'decoct[openvino]'") from None
    if not path.is_file():
        raise ValueError(f"{path} does not exist; write it with decoct export --to openvino")
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "KV_CACHE_PRECISION": "f32",
        **({} if rounded else {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}),
    }
    try:
        return openvino.Core().compile_model(path, "CPU", settings)
    except RuntimeError as error:
        raise ValueError(f"OpenVINO does not load {path}: {' '.join(str(error).split())[:300]}") from None

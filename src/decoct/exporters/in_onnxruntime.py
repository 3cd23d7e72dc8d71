"""onnxruntime, run on a folder that was written: sequences that hold their keys and values in place."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from decoct.store import read_json

HINT = "not loaded in onnxruntime: pip install 'decoct[onnx]'"
_TOKENS_AT_ONCE = 512  # of a prompt


class OnnxDecoder:
    """A decoder with a cache for each of its seats, which the graph writes where it reads.

    Attributes:
        context: the most tokens that a sequence may have.
        num_seats: sequences that it holds at once.
        nbytes: of the weights, as they lie in the folder.
    """

    def __init__(self, folder: Path, *, context: int, num_seats: int = 1) -> None:
        """Load.

        Args:
            folder: as `decoct export --to onnx` writes it.
            context: the most tokens that a sequence may have.
            num_seats: sequences to hold at once.

        Raises:
            ValueError: onnxruntime is missing, or does not load the folder.
        """
        self.context, self.num_seats = context, num_seats
        config = read_json(folder / "genai_config.json")["model"]
        decoder = config["decoder"]
        self._session = _session(folder / decoder["filename"])
        self.nbytes = sum(path.stat().st_size for path in folder.glob(f"{decoder['filename']}*"))
        self._vocabulary = int(config["vocab_size"])
        shape = (1, decoder["num_key_value_heads"], context, decoder["head_size"])
        self._names = [
            (f"past_key_values.{block}.{each}", f"present.{block}.{each}")
            for block in range(decoder["num_hidden_layers"])
            for each in ("key", "value")
        ]
        self._caches = [[torch.zeros(shape) for _ in self._names] for _ in range(num_seats)]
        self._lengths = [0] * num_seats

    def length(self, seat: int) -> int:
        """Tokens that a sequence has so far."""
        return self._lengths[seat]

    def release(self, seat: int) -> None:
        """Forget a sequence."""
        self._lengths[seat] = 0

    def advance(self, seat: int, tokens: Sequence[int]) -> Float[Tensor, " vocab"]:
        """Take tokens in, long prompts by pieces; gives the logits after the last one."""
        found = torch.empty(1, 1, self._vocabulary)
        for start in range(0, len(tokens), _TOKENS_AT_ONCE):
            self._run(seat, torch.tensor([list(tokens[start : start + _TOKENS_AT_ONCE])]), found)
        return found[0, 0]

    def _run(self, seat: int, tokens: Tensor, logits: Tensor) -> None:
        total = self._lengths[seat] + tokens.shape[1]
        assert total <= self.context, "the caller counts tokens"
        binding = self._session.io_binding()
        mask = torch.ones(1, total, dtype=torch.int64)
        for name, tensor in (("input_ids", tokens), ("attention_mask", mask)):
            binding.bind_input(name, "cpu", 0, 7, tuple(tensor.shape), tensor.data_ptr())
        for (past, present), cache in zip(self._names, self._caches[seat], strict=True):
            binding.bind_input(past, "cpu", 0, 1, tuple(cache.shape), cache.data_ptr())
            binding.bind_output(present, "cpu", 0, 1, tuple(cache.shape), cache.data_ptr())
        binding.bind_output("logits", "cpu", 0, 1, tuple(logits.shape), logits.data_ptr())
        self._session.run_with_iobinding(binding)
        self._lengths[seat] = total


def _session(path: Path) -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise ValueError("running ONNX needs the onnxruntime package: pip install 'decoct[onnx]'") from None
    if not path.is_file():
        raise ValueError(f"{path} does not exist; write it with decoct export --to onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.log_severity_level = 3
    from onnxruntime.capi import onnxruntime_pybind11_state as states

    refusals = (states.Fail, states.InvalidArgument, states.InvalidGraph, states.InvalidProtobuf, states.NotImplemented,
                states.RuntimeException, RuntimeError)  # fmt: skip

    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except refusals as error:
        raise ValueError(f"onnxruntime does not load {path}: {' '.join(str(error).split())[:300]}") from None

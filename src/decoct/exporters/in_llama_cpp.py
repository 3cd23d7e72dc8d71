"""llama.cpp, run on a file that was written: its tokens and log-probabilities. Needs the xllamacpp package."""

import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import torch

from decoct.exporters.compare import NUM_NEW, Written

HINT = "not loaded in llama.cpp: pip install 'decoct[llama-cpp]'"
_PROBABILITIES = 256  # of the likeliest tokens


class LlamaCpp:
    """A server on a local port of its own, alive as long as this object."""

    def __init__(self, path: Path, *, context: int = 512) -> None:
        """Load a file.

        Raises:
            ImportError: xllamacpp is not installed.
            ValueError: llama.cpp does not load the file.
        """
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
        params.n_ctx, params.n_parallel = context, 1
        params.warmup, params.verbosity = False, 0
        try:
            self._server = xllamacpp.Server(params)
        except RuntimeError as error:
            raise ValueError(f"llama.cpp does not load {path}: {error}") from None
        self._address = str(self._server.listening_address)

    def tokenize(self, text: str) -> list[int]:
        """Tokens of a text, special ones neither added nor read."""
        found = self._post("/tokenize", {"content": text, "add_special": False, "parse_special": False})
        return [int(token) for token in found["tokens"]]

    def write(self, prompt: list[int], count: int = NUM_NEW, top: int = _PROBABILITIES) -> Written:
        """Go on with the likeliest token `count` times.

        Probabilities are only told of tokens that end a character, so each time the last one of the prompt is made to
        follow; they are what the model gives before that.
        """
        tokens, logprobs = list(prompt), []
        asked = {"n_predict": 1, "temperature": 0.0, "n_probs": top, "logit_bias": [[prompt[-1], 1e4]]}
        for _ in range(count):
            (step,) = self._post("/completion", {"prompt": tokens, **asked})["completion_probabilities"]
            likely = {int(each["id"]): float(each["logprob"]) for each in step["top_logprobs"]}
            logprobs.append(likely)
            tokens.append(max(likely, key=lambda token: likely[token]))
        written = tokens[len(prompt) :]
        return Written(prompt, written, logprobs, str(self._post("/detokenize", {"tokens": written})["content"]))

    def _post(self, path: str, value: dict[str, Any]) -> dict[str, Any]:
        body, headers = json.dumps(value).encode(), {"Content-Type": "application/json"}
        request = urllib.request.Request(self._address + path, body, headers)  # noqa: S310 - our own address
        try:
            with urllib.request.urlopen(request) as answer:  # noqa: S310
                found: dict[str, Any] = json.load(answer)
        except urllib.error.HTTPError as error:
            raise ValueError(f"llama.cpp refused {path}: {error.read().decode(errors='replace')[:300]}") from None
        return found

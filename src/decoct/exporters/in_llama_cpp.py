"""llama.cpp, run on a file that was written: its tokens and log-probabilities. Needs the xllamacpp package."""

import json
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Self

import torch

from decoct.exporters.compare import NUM_NEW, Written

HINT = "not loaded in llama.cpp: pip install 'decoct[llama-cpp]'"
_PROBABILITIES = 256  # of the likeliest tokens
_PATIENCE = 300  # seconds for an answer


_SERVE = """
import os, sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(sys.argv[2])
params.n_ctx, params.n_parallel = int(sys.argv[3]), 1
params.warmup, params.verbosity = False, 1
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()
os._exit(0)
"""


class LlamaCpp:
    """A server on a local port of its own, in a process of its own: a file that it cannot run may end that process."""

    def __init__(self, path: Path, *, context: int = 512) -> None:
        """Load a file. Use it in a `with` statement, which ends the process.

        Raises:
            ValueError: llama.cpp does not load the file.
        """
        self._said = TemporaryFile()  # noqa: SIM115 - closed with the process
        command = [sys.executable, "-c", _SERVE, str(path), str(torch.get_num_threads()), str(context)]
        self._process = subprocess.Popen(  # noqa: S603 - our own interpreter
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True
        )
        assert self._process.stdout is not None
        self._address = next((line.strip() for line in self._process.stdout if line.startswith("http")), "")
        if not self._address:
            reason = self._reason()
            self.close()
            raise ValueError(f"llama.cpp does not load {path}: {reason}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._said.close()

    def _reason(self) -> str:
        """The first error that it told."""
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").splitlines()
        told = [line for line in lines if "error" in line.lower()]
        return (told or lines or ["it ended without a word"])[0].strip()[-300:]

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
            with urllib.request.urlopen(request, timeout=_PATIENCE) as answer:  # noqa: S310
                found: dict[str, Any] = json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                raise ValueError(f"llama.cpp refused {path}: {error.read().decode(errors='replace')[:300]}") from None
        except OSError as error:
            raise ValueError(f"llama.cpp ended while it ran: {self._reason()} ({error})") from None
        return found

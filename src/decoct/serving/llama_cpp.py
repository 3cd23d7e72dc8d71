"""The engine llama.cpp, by the xllamacpp package: runs a .gguf file. While loaded it listens on a loopback port."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from decoct.serving.engine import Generation, OnPiece, Options, Piece, Prompt, Timing

_ENDS = {"stop": "stop", "length": "length"}


class LlamaCpp:
    """A .gguf file in llama.cpp.

    Attributes:
        name: "llama.cpp".
        about: one line: what computes.
        context: the most tokens that prompt and answer may have together.
        weight_nbytes: of the file.
        chats: llama.cpp takes a template of its own where the file has none.
        remove: called when the engine is closed: takes a file away that was only made for it.
    """

    name = "llama.cpp"
    chats = True

    def __init__(self, path: Path, *, context: int) -> None:
        """Load a file.

        Args:
            path: the file.
            context: the most tokens that prompt and answer may have together.

        Raises:
            ValueError: xllamacpp is not installed, or llama.cpp does not load the file.
        """
        try:
            import xllamacpp
        except ImportError:
            raise ValueError(
                "the engine llama.cpp needs the xllamacpp package: pip install 'decoct[llama-cpp]'"
            ) from None
        if not path.is_file():
            raise ValueError(f"{path} does not exist")
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
        params.n_ctx, params.n_parallel, params.use_jinja = context, 1, True
        params.warmup, params.verbosity, params.fit_params = False, 0, False
        self.about, self.context, self.weight_nbytes = "llama.cpp (xllamacpp)", context, path.stat().st_size
        self.remove: Callable[[], None] = lambda: None
        try:
            self._server: Any = xllamacpp.Server(params)
        except RuntimeError as error:
            raise ValueError(f"llama.cpp does not load {path}: {error}") from None

    def generate(
        self, prompts: Sequence[Prompt], options: Options, on_piece: OnPiece = lambda _which, _piece: None
    ) -> list[Generation]:
        """Answer several prompts, one after another; see `Engine`."""
        return [self._one(which, prompt, options, on_piece) for which, prompt in enumerate(prompts)]

    def time(self, prompt_tokens: int, decode_tokens: int) -> Timing:
        """One round of so many tokens, timed by llama.cpp; see `Engine`."""
        prompt = torch.randint(3, 200, (prompt_tokens,), generator=torch.Generator().manual_seed(0)).tolist()
        asked = {
            "prompt": prompt, "n_predict": decode_tokens + 1, "temperature": 0.0, "ignore_eos": True,
            "cache_prompt": False,
        }  # fmt: skip
        found = _checked(self._server.handle_completions(asked))["timings"]
        prefill, decode = found["prompt_ms"] / 1000, found["predicted_ms"] / 1000
        return Timing(prefill, prefill, decode, int(found["prompt_n"]), int(found["predicted_n"]))

    def close(self) -> None:
        """Unload, and remove what was made for it."""
        self._server = None
        self.remove()

    def _one(self, which: int, prompt: Prompt, options: Options, on_piece: OnPiece) -> Generation:
        began = time.monotonic()
        first: list[float] = []
        pieces: list[str] = []
        last: dict[str, Any] = {}

        def take(chunk: dict[str, Any]) -> None:
            last.update(chunk)  # an error too: an exception would be lost between here and the caller
            for choice in chunk.get("choices", ()):
                text = choice["delta"].get("content") if "delta" in choice else choice.get("text")
                if text:
                    first.append(time.monotonic())
                    pieces.append(text)
                    on_piece(which, Piece(text))
                if choice.get("finish_reason"):
                    last["finish"] = _ENDS.get(choice["finish_reason"], "stop")

        asked = _request(options, self.context)
        if isinstance(prompt, str):
            self._server.handle_completions({**asked, "prompt": prompt}, take)
        else:
            self._server.handle_chat_completions({**asked, "messages": [dict(m) for m in prompt]}, take)
        _checked(last)
        ended = time.monotonic()
        on_piece(which, Piece("", last["finish"]))
        usage = last["usage"]
        return Generation(
            text="".join(pieces),
            tokens=int(usage["completion_tokens"]),
            prompt_tokens=int(usage["prompt_tokens"]),
            finish=last["finish"],
            seconds=ended - began,
            first_token_seconds=(first[0] if first else ended) - began,
        )


def _request(options: Options, context: int) -> dict[str, Any]:
    """Our options by llama.cpp's names; its own defaults, which filter more, are switched off."""
    sampling = options.sampling
    asked: dict[str, Any] = {
        "stream": True,
        "stream_options": {"include_usage": True},
        "n_predict": -1 if options.max_tokens is None else options.max_tokens,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "repeat_penalty": sampling.repetition_penalty,
        "repeat_last_n": context,
        "stop": list(options.stop),
        "ignore_eos": options.ignore_end,
    }
    return asked if sampling.seed is None else {**asked, "seed": sampling.seed}


def _checked(found: dict[str, Any]) -> dict[str, Any]:
    """An answer that is no error.

    Raises:
        ValueError: it is one.
    """
    error = found.get("error")
    if error is None:
        return found
    if error.get("type") == "exceed_context_size_error":
        raise ValueError(
            f"the prompt has {error['n_prompt_tokens']} tokens, the context is {error['n_ctx']}; "
            "shorten it or take a larger context"
        )
    raise ValueError(f"llama.cpp: {error.get('message', error)}")

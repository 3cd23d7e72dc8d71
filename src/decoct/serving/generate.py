"""`decoct.generate`: text from a checkpoint in one call."""

from collections.abc import Sequence
from pathlib import Path

from decoct.runtime.sampling import Sampling
from decoct.serving.engine import Generation, OnPiece, Options, Prompt
from decoct.serving.engines import open_engine

_MOST_SEATS = 8


def generate(
    model: str | Path,
    prompts: str | Sequence[Prompt],
    *,
    max_tokens: int | None = 128,
    stop: Sequence[str] = (),
    sampling: Sampling | None = None,
    engine: str = "decoct",
    context: int | None = None,
    on_piece: OnPiece = lambda _which, _piece: None,
) -> list[Generation]:
    """Go on with texts, or answer conversations; several run together.

    Args:
        model: folder, .gguf file, or hub id.
        prompts: one text; or several, each a text or a conversation (a list of {"role": …, "content": …}).
        max_tokens: at most, for each; None: to the end of the context.
        stop: texts at which an answer ends.
        sampling: how tokens are drawn; None: always the likeliest.
        engine: "decoct", "decoct-int8", "transformers", "cuda", "llama.cpp", "onnxruntime" or "openvino".
        context: the most tokens that prompt and answer may have together; None: the model's own up to 4096.
        on_piece: told (which prompt, what was written) while it is written.

    Raises:
        ValueError: anything the user can mend, in one line.
    """
    asked = [prompts] if isinstance(prompts, str) else list(prompts)
    if not asked:
        raise ValueError("give at least one prompt")
    options = Options(max_tokens=max_tokens, stop=tuple(stop), sampling=sampling or Sampling())
    opened = open_engine(engine, model, context=context, num_seats=min(len(asked), _MOST_SEATS))
    try:
        return opened.generate(asked, options, on_piece)
    finally:
        opened.close()

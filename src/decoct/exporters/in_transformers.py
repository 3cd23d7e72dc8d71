"""transformers, run on a folder that was written: its tokens and logits. The folder must load without decoct."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from warnings import catch_warnings, filterwarnings

import torch

from decoct.exporters.compare import NUM_NEW, Written, compare, enough_memory, our_logits, prompt_tokens
from decoct.exporters.report import Check
from decoct.model import Model


def verify_in_transformers(
    model: Model, out: Path, *, unpack: bool, nearly: bool, unrounded: bool
) -> tuple[list[Check], str | None]:
    """Load a folder, let it write, and compare.

    Args:
        model: what was written.
        out: the folder.
        unpack: have compressed-tensors unpack while loading (asymmetric and MX formats need it).
        nearly: transformers' arithmetic for it is known to differ from engines' kernels, and from ours.
        unrounded: the format does not say that inputs are rounded, so ours are not either.
    """
    refused = enough_memory(4.5 * model.num_parameters, out)
    if refused is not None:
        return [refused], None
    try:
        network, notes = load(out, unpack=unpack)
    except (ValueError, RuntimeError, KeyError, ImportError) as error:
        return [Check("load", ok=False, detail=f"transformers: {' '.join(str(error).split())[:300]}")], None
    missing = sorted(notes["missing_keys"]) + sorted(notes["unexpected_keys"])
    checks = [
        Check("load", not missing, f"transformers; missing or unknown: {missing[:3]}" if missing else "transformers")
    ]
    written = write_on(network, prompt_tokens(model))
    tokens = torch.tensor([*written.prompt, *written.tokens])
    ours = our_logits(model, tokens, (lambda name: _dense(model, name)) if unrounded else None)
    checks.append(compare("logits", ours, written, nearly=nearly))
    return checks, text_of(out, written)


def load(folder: Path, *, unpack: bool) -> tuple[Any, dict[str, Any]]:
    """The model in float32 (bfloat16 if it is unpacked), and which tensors were missing or unknown."""
    from transformers import AutoModelForCausalLM

    settings: dict[str, Any] = {}
    if unpack:
        from transformers import CompressedTensorsConfig

        settings["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    dtype = torch.bfloat16 if unpack else torch.float32
    with _without_bars(), catch_warnings():  # that settings are given beside those in config.json, which is meant
        filterwarnings("ignore", "You passed `quantization_config`", UserWarning)
        network, notes = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True, **settings)
    return network.eval(), notes


@contextmanager
def _without_bars() -> Iterator[None]:
    """Transformers' progress bars are not decoct's."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@torch.no_grad()
def write_on(network: Any, prompt: list[int]) -> Written:
    """What a network goes on with, the likeliest token each time."""
    tokens = list(prompt)
    limit = network.config.max_position_embeddings or 2048
    logits = []
    for _ in range(min(NUM_NEW, limit - len(prompt))):
        logits.append(network(torch.tensor([tokens]), use_cache=False).logits[0, -1].float().log_softmax(-1))
        tokens.append(int(logits[-1].argmax()))
    logprobs = [{i: value for i, value in enumerate(row.tolist()) if value > -20} for row in logits]
    return Written(prompt, tokens[len(prompt) :], logprobs, "")


def text_of(folder: Path, written: Written) -> str | None:
    """What was written, by a folder's tokenizer; None: it has none."""
    from transformers import AutoTokenizer

    try:
        return str(AutoTokenizer.from_pretrained(folder).decode(written.tokens))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _dense(model: Model, name: str) -> Any:
    from decoct.weights import Dense

    return Dense.of(model.weight(name).unpack(torch.float32))

"""peft, run on an adapter that was written: its logits on the stock model. Needs the peft package."""

from pathlib import Path
from warnings import catch_warnings, simplefilter

import torch

from decoct.exporters.compare import compare, enough_memory, our_logits, prompt_tokens
from decoct.exporters.in_transformers import load, text_of, write_on
from decoct.exporters.peft import BASE
from decoct.exporters.report import Check
from decoct.model import Model
from decoct.weights import Dense

HINT = "not loaded in peft: pip install 'decoct[train]'"


def verify_in_peft(model: Model, out: Path) -> tuple[list[Check], str | None]:
    """Load a base and its adapter, let them write, and compare."""
    try:
        from peft import PeftModel
    except ImportError:
        return [Check("load", ok=None, detail=HINT)], None
    refused = enough_memory(4.5 * model.num_parameters, out)
    if refused is not None:
        return [refused], None
    try:
        network, notes = load(out / BASE, unpack=False)
        with catch_warnings():  # peft's own use of transformers
            simplefilter("ignore", FutureWarning)
            adapted = PeftModel.from_pretrained(network, str(out)).eval()
    except (ValueError, RuntimeError, KeyError, ImportError, TypeError) as error:
        return [Check("load", ok=False, detail=f"peft: {' '.join(str(error).split())[:300]}")], None
    missing = sorted(notes["missing_keys"]) + sorted(notes["unexpected_keys"])
    checks = [Check("load", not missing, f"peft; missing or unknown: {missing[:3]}" if missing else "peft")]
    written = write_on(adapted, prompt_tokens(model))
    tokens = torch.tensor([*written.prompt, *written.tokens])
    ours = our_logits(model, tokens, lambda name: Dense.of(model.weight(name).unpack(torch.float32)))
    checks.append(compare("logits", ours, written))
    return checks, text_of(out / BASE, written)

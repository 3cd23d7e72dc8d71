"""A GGUF file, read back with the gguf package and run in llama.cpp."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from decoct.engine.data import load_tokenizer
from decoct.exporters.compare import (
    Written,
    compare,
    dense_weights,
    enough_memory,
    our_logits,
    prompt_tokens,
    shapes_check,
)
from decoct.exporters.gguf.write import Entry, GgufPlan
from decoct.exporters.in_llama_cpp import HINT, LlamaCpp
from decoct.exporters.report import Check
from decoct.model import Model

_SAMPLE = (
    "Once upon a time, in 1984, Zoë's café (№ 5) sold 12345 crêpes!\n\n\tIt's “déjà vu”: 3.14 ≈ π, don't you THINK?"
)
_HALF = 2.0**-10  # of a weight: scales and minima are rounded to float16


def verify_gguf(plan: GgufPlan, path: Path, *, load: bool = True) -> tuple[list[Check], str | None]:
    """Everything that can be checked here, and what llama.cpp wrote."""
    reader = GgufReader(plan, path)
    checks = [reader.check_tensors(), *reader.check_values()]
    if not load or find_spec("xllamacpp") is None:
        return [*checks, Check("load", ok=None, detail=HINT if load else "left out as asked")], None
    refused = enough_memory(2 * path.stat().st_size, path)
    if refused is not None:
        return [*checks, refused], None
    model, prompt = plan.model, prompt_tokens(plan.model)
    try:
        with LlamaCpp(path, context=min(512, plan.model.max_length or 512)) as engine:
            written = engine.write(prompt)
            checks.append(_check_tokenizer(model, engine))
    except ValueError as error:
        return [*checks, Check("load", ok=False, detail=str(error))], None
    checks.append(Check("load", ok=True, detail="llama.cpp (xllamacpp)"))
    tokens = torch.tensor([*written.prompt, *written.tokens])
    if not all(choice.exact for choice in plan.choices.values()):
        fitted = our_logits(model, tokens, dense_weights(reader.matrix))
        checks.append(compare("logits of what was written", fitted, written))
        checks.append(_difference(our_logits(model, tokens), written))
    else:
        checks.append(compare("logits", our_logits(model, tokens), written))
    return checks, written.text


def _difference(ours: Tensor, written: Written) -> Check:
    """From the model as decoct has it: what fitting cost, which is no failure."""
    found = compare("logits of decoct's own", ours, written)
    return Check(found.name, ok=True, detail=f"{found.detail} (rounding to these types included)")


def _check_tokenizer(model: Model, engine: LlamaCpp) -> Check:
    ours = list(load_tokenizer(model)(_SAMPLE, add_special_tokens=False)["input_ids"])
    theirs = engine.tokenize(_SAMPLE)
    if ours == theirs:
        return Check("tokenizer", ok=True, detail=f"the same {len(ours)} tokens of a sample text")
    at = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), len(ours))
    return Check(
        "tokenizer", ok=False, detail=f"a sample text's token {at} differs: {theirs[at:][:3]}, not {ours[at:][:3]}"
    )


class GgufReader:
    """What was written, as the gguf package reads it."""

    def __init__(self, plan: GgufPlan, path: Path) -> None:
        """Open the file."""
        import gguf

        self._plan = plan
        self._found: dict[str, Any] = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
        self._entries = {entry.source: entry for entry in plan.entries()}

    def check_tensors(self) -> Check:
        """Names, shapes and types."""
        wanted = {
            entry.name: (*entry.shape, entry.choice.kind if entry.choice else "F32") for entry in self._entries.values()
        }
        found = {
            name: (*(int(n) for n in reversed(tensor.shape)), tensor.tensor_type.name)
            for name, tensor in self._found.items()
        }
        return shapes_check("tensors", wanted, found)

    def check_values(self) -> list[Check]:
        """Each matrix beside ours: those held exactly must be the same, of the others the error is told."""
        worst, worst_name, errors = 0.0, "", dict[str, list[float]]()
        for name, choice in self._plan.choices.items():
            ours, theirs = self._plan.model.weight(name).unpack(torch.float32), self.matrix(name)
            error = float((theirs - ours).norm() / ours.norm().clamp(min=torch.finfo(torch.float32).tiny))
            if choice.exact and (choice.kind != "F16" or self._plan.model.dtype == torch.float16):
                if error >= worst:
                    worst, worst_name = error, name
            else:
                errors.setdefault(choice.kind, []).append(error**2)
        found = []
        if worst_name:
            detail = f"largest relative error {worst:.1e} ({worst_name})"
            found.append(Check("exact values", worst <= _HALF, detail))
        for kind, values in errors.items():
            detail = f"relative squared error {sum(values) / len(values):.2e} on average, {max(values):.2e} at most"
            found.append(Check(f"fitted {kind}", ok=True, detail=detail))
        return found

    def matrix(self, name: str) -> Tensor:
        """A slot's matrix, dequantized, rows in our order and padded to its old shape."""
        from gguf.quants import dequantize

        entry: Entry = self._entries[name]
        tensor = self._found[entry.name]
        assert entry.choice is not None
        rows = torch.tensor(dequantize(tensor.data, tensor.tensor_type)).reshape(entry.shape)
        rows = self._plan.unpermuted(name, rows)
        out, cols = self._plan.model.shape(name)
        return torch.nn.functional.pad(rows, (0, cols - rows.shape[1], 0, out - rows.shape[0]))

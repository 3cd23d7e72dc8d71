"""An ONNX folder, read back with the onnx package and run in onnxruntime."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from decoct.exporters.compare import (
    NUM_NEW,
    Written,
    compare,
    dense_weights,
    enough_memory,
    our_logits,
    prompt_tokens,
)
from decoct.exporters.held import Codes, Held
from decoct.exporters.in_onnxruntime import HINT, OnnxDecoder
from decoct.exporters.onnx.write import GRAPH, VARIANTS, OnnxPlan
from decoct.exporters.report import Check, size_of
from decoct.ops.packing import unpack_bits

_SAME = 1e-6  # relative: products of float32 numbers rounded once


def verify_onnx(plan: OnnxPlan, out: Path, *, load: bool = True) -> tuple[list[Check], str | None]:
    """Everything that can be checked here, and what onnxruntime wrote."""
    reader = OnnxReader(plan, out)
    checks = [reader.check_values()]
    if not load or find_spec("onnxruntime") is None:
        return [*checks, Check("load", ok=None, detail=HINT if load else "left out as asked")], None
    refused = enough_memory(2 * size_of(out), out)
    if refused is not None:
        return [*checks, refused], None
    prompt = prompt_tokens(plan.model)
    try:
        written = write_with(OnnxDecoder(out, context=len(prompt) + NUM_NEW), prompt)
    except ValueError as error:
        return [*checks, Check("load", ok=False, detail=str(error))], None
    checks.append(Check("load", ok=True, detail="onnxruntime"))
    tokens = torch.tensor([*written.prompt, *written.tokens])
    exact = all(held.exact for held in plan.held.values())
    ours = our_logits(plan.model, tokens, None if exact else dense_weights(reader.matrix))
    rounded = plan.level == VARIANTS["rounded"] and any(held.bits is not None for held in plan.held.values())
    checks.append(compare("logits", ours, written, nearly=rounded))
    return checks, text_of(plan, written.tokens)


def write_with(decoder: OnnxDecoder, prompt: list[int]) -> Written:
    """Go on with the likeliest token, through the cache."""
    tokens, logprobs, fed = list(prompt), [], list(prompt)
    for _ in range(NUM_NEW):
        row = decoder.advance(0, fed).log_softmax(-1)
        logprobs.append({i: value for i, value in enumerate(row.tolist()) if value > -20})
        fed = [int(row.argmax())]
        tokens += fed
    return Written(prompt, tokens[len(prompt) :], logprobs, "")


def text_of(plan: OnnxPlan, tokens: list[int]) -> str | None:
    """Of tokens; None: there is no tokenizer."""
    from decoct.engine.data import load_tokenizer

    try:
        return str(load_tokenizer(plan.model).decode(tokens))
    except ValueError:
        return None


class OnnxReader:
    """What was written, as the onnx package reads it."""

    def __init__(self, plan: OnnxPlan, out: Path) -> None:
        """Open the graph; tensors are read when they are asked for."""
        import onnx

        self._plan, self._out = plan, out
        graph = onnx.load(out / GRAPH, load_external_data=False).graph
        self._found = {each.name: each for each in graph.initializer}

    def check_values(self) -> Check:
        """Each matrix, norm and bias beside ours: they have to be the same."""
        worst, worst_name, count = 0.0, "", 0
        for name, ours in self._ours():
            theirs = self.matrix(name) if name in self._plan.held else self._tensor(name).float()
            error = float((theirs - ours).norm() / ours.norm().clamp(min=torch.finfo(torch.float32).tiny))
            count += 1
            if error >= worst:
                worst, worst_name = error, name
        return Check("values", worst <= _SAME, f"{count} tensors, largest relative error {worst:.1e} ({worst_name})")

    def matrix(self, name: str) -> Float[Tensor, "out in"]:
        """A slot's matrix in float32, from what lies in the folder."""
        held, cols = self._plan.held[name], self._plan.model.shape(name)[1]
        return self._tensor(name).float() if held.bits is None else self._codes(name, held).unpack(cols)

    def _ours(self) -> Iterator[tuple[str, Tensor]]:
        model = self._plan.model
        for name in self._plan.held:
            yield name, model.weight(name).unpack(torch.float32)
        for block in (None, *range(model.num_blocks)):
            yield from ((name, model.tensor(name).float()) for name in model.others(block))

    def _codes(self, name: str, held: Held) -> Codes:
        assert held.bits is not None
        packed = self._tensor(f"{name}.codes")
        rows, groups, _ = packed.shape
        codes = unpack_bits(packed.reshape(rows, -1), held.bits, groups * held.group)
        zero = torch.full((rows, groups), 2.0 ** (held.bits - 1))
        if held.zero != "middle":
            zero = self._tensor(f"{name}.zeros")
            zero = zero if held.zero == "real" else unpack_bits(zero, held.bits, groups).float()
        return Codes(codes.reshape(rows, groups, held.group), self._tensor(f"{name}.scales").float(), zero)

    def _tensor(self, name: str) -> Tensor:
        from onnx import TensorProto
        from onnx.numpy_helper import to_array

        proto: Any = self._found[name]
        array = to_array(proto, base_dir=str(self._out))
        if proto.data_type == TensorProto.BFLOAT16:
            return torch.from_numpy(array.view("int16").copy()).view(torch.bfloat16)
        return torch.from_numpy(array.copy())

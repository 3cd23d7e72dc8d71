"""An ONNX folder: the graph, its tensors beside it, what onnxruntime-genai has to know, and the tokenizer."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from decoct.exporters.held import Held, Kernels, choose_held, note_of
from decoct.exporters.llama_like import Sizes, draw, sizes_of
from decoct.exporters.onnx.draw import LOGITS, TURNED, OnnxCanvas
from decoct.exporters.onnx.genai import GENAI, genai_config
from decoct.exporters.onnx.graph import OnnxGraph
from decoct.model import Model
from decoct.store import atomic_path, write_json

GRAPH, TENSORS = "model.onnx", "model.onnx.data"
VARIANTS = {"rounded": 4, "unrounded": 1}
"""Whether products of packed matrices may round their inputs to 8 bits, as MatMulNBits' `accuracy_level`."""


@dataclass(frozen=True, slots=True)
class OnnxPlan:
    """A folder before it is written.

    Attributes:
        model: what is written.
        sizes: the model's.
        held: how each matrix is written, by full name.
        level: see VARIANTS.
    """

    model: Model
    sizes: Sizes
    held: dict[str, Held]
    level: int

    def notes(self) -> tuple[str, ...]:
        """What a user should know of the choices."""
        if self.sizes.head_size % TURNED == 0:
            return (note_of(self.held),)
        positions = f"heads of {self.sizes.head_size} channels get right positions in batches of equal lengths only"
        return note_of(self.held), f"{positions}: give other runtimes one sequence at a time"


def plan_onnx(model: Model, variant: str | None, *, fold: bool) -> OnnxPlan:
    """What a folder would be; looks at descriptions alone.

    Raises:
        MisfitError: the model's blocks are not drawn, or no kernel takes a matrix, and `fold` is not set.
        ValueError: the onnx package is missing.
    """
    if find_spec("onnx") is None:
        raise ValueError("writing ONNX needs the onnx package: pip install 'decoct[onnx]'")
    sizes = sizes_of(model)
    return OnnxPlan(model, sizes, choose_held(model, KERNELS, fold=fold), VARIANTS[variant or "rounded"])


def write_onnx(plan: OnnxPlan, out: Path) -> None:
    """Write the folder; the graph comes after its tensors, genai_config.json last."""
    model = plan.model
    with atomic_path(out / TENSORS) as partial, OnnxGraph(partial, TENSORS) as graph:
        logits = draw(model, OnnxCanvas(graph, model, plan.sizes, plan.held, plan.level))
        graph.node("Identity", [logits], LOGITS)
        whole = graph.model(*_ends(plan))
    with atomic_path(out / GRAPH) as partial:
        partial.write_bytes(whole.SerializeToString())
    model.source.save_extras(out)
    write_json(out / "config.json", {k: v for k, v in model.config.items() if k != "quantization_config"})
    write_json(out / GENAI, genai_config(model, plan.sizes, GRAPH))


def _group(size: int, cols: int) -> int | None:
    """The block size to write: a power of two from 16 to 256 in which groups are whole; rows of one scale are free."""
    if size == cols:
        return next((block for block in (128, 64, 32, 16) if cols % block == 0), 32)
    return next((block for block in (256, 128, 64, 32, 16) if size % block == 0), None)


KERNELS = Kernels("ONNX", (2, 4, 8), _group, "a multiple of 16", real_zero=4)
"""What MatMulNBits and GatherBlockQuantized take."""

Ends = tuple[dict[str, tuple[str, list[str | int]]], dict[str, list[str | int]]]


def _ends(plan: OnnxPlan) -> Ends:
    """Inputs and outputs, as onnxruntime-genai names them."""
    size = plan.sizes
    inputs: dict[str, tuple[str, list[str | int]]] = {
        "input_ids": ("INT64", ["batch_size", "sequence_length"]),
        "attention_mask": ("INT64", ["batch_size", "total_sequence_length"]),
    }
    outputs: dict[str, list[str | int]] = {LOGITS: ["batch_size", 1, size.vocabulary]}
    for block in range(plan.model.num_blocks):
        for each in ("key", "value"):
            past: list[str | int] = ["batch_size", size.kv_heads, "past_sequence_length", size.head_size]
            inputs[f"past_key_values.{block}.{each}"] = ("FLOAT", past)
            total: list[str | int] = ["batch_size", size.kv_heads, "total_sequence_length", size.head_size]
            outputs[f"present.{block}.{each}"] = total
    return inputs, outputs

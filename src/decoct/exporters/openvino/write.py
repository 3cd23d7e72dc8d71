"""An OpenVINO folder: the graph and its constants as IR, config.json and the tokenizer."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from decoct.exporters.held import Held, Kernels, choose_held, note_of
from decoct.exporters.in_openvino import GRAPH
from decoct.exporters.llama_like import Sizes, draw, sizes_of
from decoct.exporters.openvino.draw import OpenVinoCanvas
from decoct.model import Model
from decoct.store import atomic_path, write_json

KERNELS = Kernels("OpenVINO", (2, 4, 8), lambda size, _: size, "any size", real_zero=8)
"""What the patterns of compressed constants take."""


@dataclass(frozen=True, slots=True)
class OpenVinoPlan:
    """A folder before it is written.

    Attributes:
        model: what is written.
        sizes: the model's.
        held: how each matrix is written, by full name.
    """

    model: Model
    sizes: Sizes
    held: dict[str, Held]

    def notes(self) -> tuple[str, ...]:
        """What a user should know of the choices."""
        return (note_of(self.held),)


def plan_openvino(model: Model, *, fold: bool) -> OpenVinoPlan:
    """What a folder would be; looks at descriptions alone.

    Raises:
        MisfitError: the model's blocks are not drawn, or a matrix cannot be held, and `fold` is not set.
        ValueError: the openvino package is missing.
    """
    if find_spec("openvino") is None:
        raise ValueError("writing for OpenVINO needs its package: pip install 'decoct[openvino]'")
    sizes = sizes_of(model)
    return OpenVinoPlan(model, sizes, choose_held(model, KERNELS, fold=fold))


def write_openvino(plan: OpenVinoPlan, out: Path) -> None:
    """Write the folder; the whole of it is in memory meanwhile, packed. The graph comes after its constants."""
    import openvino
    from openvino import opset15

    model = plan.model
    canvas = OpenVinoCanvas(model, plan.sizes, plan.held)
    logits = opset15.result(draw(model, canvas))
    logits.output(0).get_tensor().set_names({"logits"})
    whole = openvino.Model([logits], canvas.sinks, list(canvas.inputs.values()), "decoder")
    out.mkdir(parents=True, exist_ok=True)
    graph, constants = out / GRAPH, (out / GRAPH).with_suffix(".bin")
    with atomic_path(constants) as partial_constants, atomic_path(graph) as partial:
        temporary = partial.with_name(f"{partial.name}.xml")
        openvino.save_model(whole, temporary, compress_to_fp16=False)
        temporary.with_suffix(".bin").replace(partial_constants)
        temporary.replace(partial)
    model.source.save_extras(out)
    write_json(out / "config.json", {k: v for k, v in model.config.items() if k != "quantization_config"})

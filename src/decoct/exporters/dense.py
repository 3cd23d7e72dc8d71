"""dense: every weight unpacked to a plain checkpoint that anything loads; its size is the uncompressed one again."""

from pathlib import Path

from torch import Tensor

from decoct.exporters.folder import write_folder
from decoct.model import Model
from decoct.weights import QuantizedInput, described_kinds


def export_dense(model: Model, out: Path, *, fold: bool = False) -> None:
    """Write a plain folder in the model's own dtype.

    Args:
        model: what to write.
        out: the folder.
        fold: write matrices whose inputs are rounded as if they were not, instead of refusing.

    Raises:
        ValueError: the folder holds something already, or a weight rounds its inputs.
    """
    slots = model.slots()
    kinds = {name: described_kinds(description) for name, description in model.described.items()}
    rounding = [name for name, found in kinds.items() if QuantizedInput.kind in found]
    if rounding and not fold:
        raise ValueError(
            f"a dense checkpoint cannot say that the inputs of {rounding[0]} are rounded; add --fold to leave that out"
        )

    def encode(name: str) -> dict[str, Tensor]:
        matrix = model.weight(name).unpack(model.dtype)
        return {name: matrix.T if slots[name].transposed else matrix}

    write_folder(model, out, encode, None)

"""dense: every weight unpacked to a plain checkpoint that anything loads; its size is the uncompressed one again."""

from pathlib import Path

from torch import Tensor

from decoct.exporters.folder import write_folder
from decoct.model import Model


def export_dense(model: Model, out: Path) -> None:
    """Write a plain folder in the model's own dtype.

    Raises:
        ValueError: the folder holds something already.
    """
    slots = model.slots()

    def encode(name: str) -> dict[str, Tensor]:
        matrix = model.weight(name).unpack(model.dtype)
        return {name: matrix.T if slots[name].transposed else matrix}

    write_folder(model, out, encode, None)

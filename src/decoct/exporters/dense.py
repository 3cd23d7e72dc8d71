"""dense: every weight unpacked to a plain checkpoint that anything loads; its size is the uncompressed one again."""

from pathlib import Path

from torch import Tensor

from decoct.exporters.folder import write_folder
from decoct.exporters.misfit import MisfitError
from decoct.model import Model
from decoct.weights import QuantizedInput, described_kinds


def export_dense(model: Model, out: Path, *, fold: bool = False) -> None:
    """Write a plain folder in the model's own dtype.

    Args:
        model: what to write.
        out: the folder.
        fold: write matrices whose inputs are rounded as if they were not, and leave out a policy for keys and values,
            instead of refusing.

    Raises:
        MisfitError: see `check_dense`.
        ValueError: the folder holds something already.
    """
    check_dense(model, fold=fold)
    slots = model.slots()

    def encode(name: str) -> dict[str, Tensor]:
        matrix = model.weight(name).unpack(model.dtype)
        return {name: matrix.T if slots[name].transposed else matrix}

    write_folder(model, out, encode, None)


def check_dense(model: Model, *, fold: bool) -> None:
    """Refuse what a plain checkpoint cannot say. Looks at descriptions alone.

    Args:
        model: what is to be written, or what a recipe is expected to make.
        fold: leave that out.

    Raises:
        MisfitError: a weight rounds its inputs, or there is a policy for keys and values.
    """
    if fold:
        return
    advice = "add --fold to leave that out"
    for name in model.slots():
        if name in model.described and QuantizedInput.kind in described_kinds(model.described[name]):
            what = f"a dense checkpoint cannot say that the inputs of {name} are rounded"
            raise MisfitError(what, "leave the step inputs out", advice)
    if model.cache is not None:
        (policy,) = model.cache["policy"]
        what = f"a dense checkpoint cannot say that keys and values are kept by {policy}"
        raise MisfitError(what, "leave the cache stage out", advice)

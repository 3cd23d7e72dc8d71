"""An importance matrix for llama.cpp: mean squared inputs of every matrix, in the GGUF layout that its quantizer reads.

`general.type` is "imatrix"; `imatrix.datasets`, `imatrix.chunk_count` and `imatrix.chunk_size` say what text it was.
For each matrix there are `NAME.in_sum2`, the sum of squares of each input feature, and `NAME.counts`, how many inputs
that were; the quantizer divides one by the other.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from decoct.engine.budget import compute_dtype
from decoct.engine.data import Data, load_tokens
from decoct.engine.squares import gather_squares
from decoct.exporters.gguf.choose import feed_forward_widths
from decoct.exporters.gguf.keys import architecture_of
from decoct.exporters.report import Check
from decoct.model import Model
from decoct.stats import ColumnNorm
from decoct.store import atomic_path

_SUMS, _COUNTS = ".in_sum2", ".counts"


@dataclass(frozen=True, slots=True)
class ImportanceMatrix:
    """What was written.

    Attributes:
        path: of the file.
        matrices: how many have an entry.
        starved: names of those that no token reached.
        tokens: of the text.
        check: what reading it back gave.
    """

    path: Path
    matrices: int
    starved: tuple[str, ...]
    tokens: int
    check: Check


def make_imatrix(
    model: Model, data: Data, out: Path, *, on_progress: Callable[[int, int], None] = lambda *_: None
) -> ImportanceMatrix:
    """Run a text through a model, and write what its matrices read.

    Args:
        model: of a family that llama.cpp knows.
        data: the text, and how much of it.
        out: the file, which does not exist yet.
        on_progress: told how many blocks of how many are done.

    Raises:
        ValueError: a family that llama.cpp does not know, no text or too short a one, or something in the way.
    """
    names = gguf_names(model)
    if out.exists():
        raise ValueError(f"{out} is there already; choose another name for the importance matrix")
    tokens = load_tokens(data, model, lambda _: None)
    squares = gather_squares(model, tokens, compute_dtype(model.dtype), out.parent, on_progress)
    reached = {name: stat for name, stat in squares.items() if stat.num_tokens}
    write_imatrix(reached, names, out, data)
    starved = tuple(sorted(squares.keys() - reached.keys()))
    return ImportanceMatrix(out, len(reached), starved, data.num_tokens, _check(reached, names, out))


def gguf_names(model: Model) -> dict[str, tuple[str, int]]:
    """llama.cpp's name of each matrix but the embedding, and how many input features it has there, by our full name.

    Raises:
        MisfitError: llama.cpp does not know the family.
    """
    import gguf

    architecture = architecture_of(model)
    widths = None if architecture.uneven is None else feed_forward_widths(model)
    known = architecture.name if widths is None else str(architecture.uneven)
    theirs = gguf.get_tensor_name_map(gguf.MODEL_ARCH[known.upper()], model.num_blocks)
    found = {}
    for name, slot in model.slots().items():
        stem = theirs.get_name(name.removesuffix(".weight"))
        if slot.role == "embed" or stem is None:
            continue
        cols = model.shape(name)[1]
        if widths is not None and slot.role == "mlp.down":
            cols = widths[int(name.removeprefix(f"{model.family.blocks}.").split(".", 1)[0])]
        found[name] = (f"{stem}.weight", cols)
    return found


def write_imatrix(
    squares: Mapping[str, ColumnNorm], names: Mapping[str, tuple[str, int]], out: Path, data: Data
) -> None:
    """Write the file; whole or not at all.

    Args:
        squares: sums of squares by our full names.
        names: see `gguf_names`.
        out: its path.
        data: the text that they are of.
    """
    import gguf

    with atomic_path(out) as partial:
        writer = gguf.GGUFWriter(partial, "imatrix")
        writer.add_type(gguf.GGUFType.IMATRIX)
        writer.add_array(gguf.Keys.IMatrix.DATASETS, [data.source])
        writer.add_uint32(gguf.Keys.IMatrix.CHUNK_COUNT, data.num_sequences)
        writer.add_uint32(gguf.Keys.IMatrix.CHUNK_SIZE, data.sequence_length)
        for name, stat in squares.items():
            theirs, cols = names[name]
            writer.add_tensor(theirs + _SUMS, stat.total[:cols].float().unsqueeze(0).numpy())
            writer.add_tensor(theirs + _COUNTS, torch.tensor([[float(stat.num_tokens)]]).numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def read_imatrix(path: Path) -> dict[str, Float[Tensor, " in"]]:
    """Mean squared inputs of a file's matrices, by llama.cpp's names.

    Raises:
        ValueError: there is no such file, or it is no importance matrix in GGUF.
    """
    import gguf

    if not path.is_file():
        raise ValueError(f"{path} does not exist; `decoct imatrix` makes one")
    try:
        tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    except (ValueError, IndexError) as error:
        raise ValueError(f"{path} is no GGUF file ({error}); `decoct imatrix` makes one") from None
    sums = {name.removesuffix(_SUMS): values for name, values in tensors.items() if name.endswith(_SUMS)}
    if not sums or any(name + _COUNTS not in tensors for name in sums):
        raise ValueError(f"{path} holds no sums of squares with counts; `decoct imatrix` makes such a file")
    return {
        name: torch.tensor(values).flatten() / torch.tensor(tensors[name + _COUNTS]).flatten()
        for name, values in sums.items()
        if tensors[name + _COUNTS].size == 1
    }


def importance_from(path: Path, model: Model, to: str) -> dict[str, Float[Tensor, " in"]]:
    """What an export's fitted types are to go by, from a file that decoct or llama.cpp made: by our full names.

    Args:
        path: the file.
        model: what is exported.
        to: the format, such as "gguf:q4_k_m".

    Raises:
        ValueError: no such file, one of another model, or a format that fits nothing.
    """
    if not to.startswith("gguf:"):
        raise ValueError(f"an importance matrix is for what is fitted, such as gguf:q4_k_m, not for {to}; leave it out")
    found, chosen = read_imatrix(path), {}
    for name, (theirs, cols) in gguf_names(model).items():
        if theirs in found:
            if len(found[theirs]) != cols:
                raise ValueError(f"{path} is of another model: {theirs} has {cols} input features here, not there")
            chosen[name] = found[theirs]
    if not chosen:
        raise ValueError(f"{path} is of another model: it has none of {model.source.label}'s matrices")
    return chosen


def _check(squares: Mapping[str, ColumnNorm], names: Mapping[str, tuple[str, int]], out: Path) -> Check:
    """Whether the file gives the means that were gathered."""
    found, worst = read_imatrix(out), 0.0
    for name, stat in squares.items():
        theirs, cols = names[name]
        ours = (stat.total / stat.num_tokens)[:cols]
        if theirs not in found or found[theirs].shape != ours.shape:
            return Check("values", ok=False, detail=f"{theirs} is not in the file, or has another width")
        error = float((found[theirs] - ours).norm() / ours.norm().clamp(min=torch.finfo(torch.float32).tiny))
        worst = max(worst, error)
    return Check("values", worst < 1e-6, f"{len(squares)} matrices read back, largest relative error {worst:.1e}")

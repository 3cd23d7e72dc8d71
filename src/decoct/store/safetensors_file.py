"""One safetensors file, read tensor by tensor with plain reads.

The safetensors library maps files into memory: every page it touches then counts as resident, and a file that is
shorter than its header promises kills the process with a bus error. Plain reads do neither, and the format is small.
The writer gives the same bytes for the same tensors, which a resumed run is held to.
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from typing_extensions import Buffer

from decoct.store.files import atomic_path

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "U32": torch.uint32, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER = 100_000_000


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies in its file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class SafetensorsFile:
    """A file's header: tensors by name, and the metadata strings."""

    path: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """Read one tensor, or a range of its rows, into memory of its own.

        Raises:
            ValueError: the file ends before the tensor does.
        """
        info = self.tensors[name]
        shape, start, nbytes = info.shape, info.start, info.nbytes
        if rows is not None:
            first, last, _ = rows.indices(shape[0])
            row_bytes = nbytes // max(1, shape[0])
            shape, start, nbytes = (last - first, *shape[1:]), start + first * row_bytes, (last - first) * row_bytes
        buffer = torch.empty(nbytes, dtype=torch.uint8)
        if nbytes == 0:
            return torch.empty(shape, dtype=info.dtype)
        view = tensor_bytes(buffer)
        with self.path.open("rb", buffering=0) as handle:
            handle.seek(start)
            done = 0
            while done < nbytes:
                count = handle.readinto(view[done:])
                if not count:
                    raise ValueError(f"{self.path} ends inside tensor {name}; it is truncated, download it again")
                done += count
        return buffer.view(info.dtype).reshape(shape)

    def prefetch(self, name: str) -> None:
        """Ask the system to read a tensor ahead of `read`; does nothing where it cannot."""
        if sys.platform != "linux":
            return
        info = self.tensors[name]
        with self.path.open("rb", buffering=0) as handle:
            os.posix_fadvise(handle.fileno(), info.start, info.nbytes, os.POSIX_FADV_WILLNEED)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor, to read into or write from."""
    return memoryview(cast("Buffer", tensor.reshape(-1).view(torch.uint8).numpy()))


def open_safetensors(path: Path) -> SafetensorsFile:
    """Read and check a header.

    Raises:
        ValueError: the file is missing, truncated, longer than its header says, or not safetensors.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if not 2 <= length <= min(_MAX_HEADER, size - 8):
                raise ValueError(f"{path} is truncated or not a safetensors file; download or write it again")
            header: dict[str, Any] = json.loads(handle.read(length))
        metadata = header.pop("__metadata__", {})
        tensors = {name: _info(path, name, entry, 8 + length) for name, entry in header.items()}
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; the checkpoint is incomplete") from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} has a damaged header; download or write it again") from None
    end = max((info.start + info.nbytes for info in tensors.values()), default=8 + length)
    if end != size:
        state = "truncated" if size < end else "longer than its header says"
        raise ValueError(f"{path} is {state} ({size} bytes, {end} expected); download or write it again")
    return SafetensorsFile(path, tensors, metadata)


def save_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a whole file atomically; the same tensors always give the same bytes.

    (The library's own writer keeps metadata in a hash map, whose order, and so the file, differs from run to run.)
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name in names:
        tensor = tensors[name]
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_path(path) as partial, partial.open("wb") as handle:
        handle.write(len(text).to_bytes(8, "little"))
        handle.write(text)
        for name in names:
            handle.write(tensor_bytes(tensors[name].detach().contiguous()))


def _info(path: Path, name: str, entry: dict[str, Any], base: int) -> TensorInfo:
    dtype = _DTYPES.get(entry["dtype"])
    if dtype is None:
        raise ValueError(f"{path}: tensor {name} has the unsupported dtype {entry['dtype']}")
    start, stop = entry["data_offsets"]
    shape = tuple(entry["shape"])
    expected = dtype.itemsize
    for n in shape:
        expected *= n
    if start < 0 or stop - start != expected:
        raise ValueError(f"{path}: tensor {name} has {stop - start} bytes, its shape needs {expected}; it is damaged")
    return TensorInfo(dtype, shape, base + start, stop - start)

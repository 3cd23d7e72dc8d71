"""The hidden states between two blocks, in memory or in a file, always safely on disk before a block counts as done."""

import os
from pathlib import Path
from typing import BinaryIO, Self

import torch
from jaxtyping import Float
from torch import Tensor

from decoct.store import atomic_path, tensor_bytes


class Activations:
    """[sequences, tokens, hidden], read and written a few sequences at a time.

    File-backed ones use plain reads and writes: a memory map would count as resident memory, page by page, until the
    peak was as high as if there were no file.
    """

    def __init__(
        self,
        folder: Path,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        *,
        in_memory: bool,
        name: str = "activations",
    ) -> None:
        """Describe them; nothing is allocated yet.

        Args:
            folder: where the files lie.
            shape: (sequences, tokens, hidden).
            dtype: of the hidden states.
            in_memory: keep them in memory, and write a copy to disk after every block.
            name: the files' name; several chains of states can share a folder.
        """
        self.shape, self.dtype = shape, dtype
        self._folder, self._in_memory, self._name = folder, in_memory, name
        self._values: Tensor | None = torch.empty(shape, dtype=dtype) if in_memory else None
        self._source: Path | None = None
        self._target: BinaryIO | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of one copy."""
        return self.shape[0] * self._sequence_bytes

    def resume(self, block: int) -> Self:
        """Take up the inputs of a block as they were saved.

        Raises:
            ValueError: the file is gone or has another size.
        """
        path = self.path(block)
        if not path.exists() or path.stat().st_size != self.nbytes:
            raise ValueError(f"{path} is missing or damaged, so the run cannot go on; start it again with --fresh")
        self._source = path
        if self._values is not None:
            flat = tensor_bytes(self._values)
            with path.open("rb") as handle:
                handle.readinto(flat)
        return self

    def read(self, start: int, stop: int) -> Float[Tensor, "batch seq hidden"]:
        """Sequences [start, stop)."""
        if self._values is not None:
            return self._values[start:stop].clone()
        assert self._source is not None
        batch = torch.empty((stop - start, *self.shape[1:]), dtype=self.dtype)
        with self._source.open("rb", buffering=0) as handle:
            handle.seek(start * self._sequence_bytes)
            view, done = tensor_bytes(batch), 0
            while done < len(view):
                done += handle.readinto(view[done:]) or 0
        return batch

    def begin(self) -> None:
        """Start writing the next block's inputs; what `read` gives does not change (in a file) until `commit`."""
        if self._values is None:
            self._target = self._partial().open("wb", buffering=0)

    def write(self, start: int, batch: Float[Tensor, "batch seq hidden"]) -> None:
        """Replace the sequences from `start` on; in memory this overwrites what `read` gives."""
        if self._values is not None:
            self._values[start : start + batch.shape[0]] = batch
            return
        assert self._target is not None
        view, done = tensor_bytes(batch.to(self.dtype).contiguous()), 0
        self._target.seek(start * self._sequence_bytes)
        while done < len(view):
            done += self._target.write(view[done:]) or 0

    def commit(self, block: int) -> None:
        """Put what was written safely on disk as the inputs of `block`."""
        path = self.path(block)
        if self._values is not None:
            with atomic_path(path) as partial, partial.open("wb") as handle:
                handle.write(tensor_bytes(self._values))
        else:
            assert self._target is not None
            os.fsync(self._target.fileno())
            self._target.close()
            self._target = None
            self._partial().replace(path)
        self._source = path

    def discard(self, block: int) -> None:
        """Remove the file with the inputs of `block`."""
        self.path(block).unlink(missing_ok=True)

    def path(self, block: int) -> Path:
        """The file with the inputs of `block`."""
        return self._folder / f"{self._name}-{block:05d}.bin"

    def _partial(self) -> Path:
        return self._folder / f".{self._name}.partial"

    @property
    def _sequence_bytes(self) -> int:
        return self.shape[1] * self.shape[2] * self.dtype.itemsize

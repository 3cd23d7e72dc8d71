"""A teacher's likeliest tokens, kept on disk: the teacher runs once, and need not be in memory while a student learns.

A folder holds cache.json (what the cache was made from) and shards, each whole or absent. Writing goes on where an
earlier process stopped; a cache of another teacher, text or k is refused.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from decoct.engine.data import tokens_digest
from decoct.losses import Targets, TopK, keep_top
from decoct.store import open_safetensors, save_safetensors
from decoct.store.files import free_bytes, read_json, write_json
from decoct.teachers.base import Teach

FORMAT = 1
_MANIFEST = "cache.json"
_SHARD_TOKENS = 1 << 14  # in a shard, about
_ENTRY_BYTES = 8  # an index and a log-probability


@dataclass(frozen=True, slots=True)
class _Made:
    """What a cache was made from, as cache.json says."""

    format_version: int
    teacher: str
    text: str
    shape: list[int]
    k: int
    vocab: int
    sequences_per_shard: int


def cache_bytes(num_tokens: int, k: int) -> int:
    """Disk space of a cache."""
    return num_tokens * (k * _ENTRY_BYTES + 4)


def write_cache(
    folder: Path,
    teach: Teach,
    teacher: str,
    tokens: Int[Tensor, "sequences length"],
    k: int = 64,
    on_progress: Callable[[int, int], None] = lambda *_: None,
) -> None:
    """Run a teacher over a text and keep its k likeliest tokens, or go on where an earlier process stopped.

    Args:
        folder: for the cache.
        teach: the teacher.
        teacher: identifies it (`identity`).
        tokens: the text.
        k: tokens to keep for each position; all others become one bucket.
        on_progress: told of sequences done, and of all.

    Raises:
        ValueError: the folder holds a cache of something else, or the disk is too full.
    """
    count, length = tokens.shape
    per_shard = max(1, _SHARD_TOKENS // length)
    first = teach(tokens[:1])
    keep_top(first, k)  # refuses a k that does not fit before anything is written
    made = _Made(FORMAT, teacher, tokens_digest(tokens), [count, length], k, first.vocab, per_shard)
    if (folder / _MANIFEST).exists():
        _check(folder, asdict(made))
    else:
        needed, free = cache_bytes(tokens.numel(), k), free_bytes(folder)
        if needed > free:
            raise ValueError(f"the cached teacher takes {needed} bytes and {folder} has {free} left; take a smaller k")
        write_json(folder / _MANIFEST, asdict(made))
    for start in range(0, count, per_shard):
        path = _shard(folder, start // per_shard)
        if not path.exists():
            rows = [keep_top(teach(tokens[row : row + 1]), k) for row in range(start, min(start + per_shard, count))]
            found = {
                "indices": torch.stack([each.indices.to(torch.int32) for each in rows]),
                "log_probs": torch.stack([each.log_probs.float() for each in rows]),
                "log_tail": torch.stack([each.log_tail.float() for each in rows]),
            }
            save_safetensors(path, found)
        on_progress(min(start + per_shard, count), count)


class CachedTeacher:
    """A teacher that reads what it says from a cache: for the loss `cached_kl`."""

    def __init__(self, folder: Path, teacher: str, tokens: Int[Tensor, "sequences length"]) -> None:
        """Open a cache.

        Args:
            folder: where it lies.
            teacher: the teacher that it should be of.
            tokens: the text that it should be of.

        Raises:
            ValueError: there is none, it is not whole, or it is of another teacher or text.
        """
        stated = _check(folder, {"format_version": FORMAT, "teacher": teacher, "text": tokens_digest(tokens)})
        self._vocab, self._per_shard = int(stated["vocab"]), int(stated["sequences_per_shard"])
        self._numbers = {_key(row): number for number, row in enumerate(tokens)}
        last = (len(tokens) - 1) // self._per_shard
        lacking = [number for number in range(last + 1) if not _shard(folder, number).exists()]
        if lacking:
            raise ValueError(f"{folder} lacks {len(lacking)} of {last + 1} shards; write the cache to its end first")
        self._shards = [open_safetensors(_shard(folder, number)) for number in range(last + 1)]

    def __call__(self, tokens: Int[Tensor, "batch length"]) -> Targets:
        """What the teacher said of these sequences.

        Raises:
            ValueError: a sequence that is not in the cache.
        """
        read = [self._read(row) for row in tokens]
        indices, log_probs, log_tail = (torch.cat(each) for each in zip(*read, strict=True))
        return TopK(indices, log_probs, log_tail, self._vocab)

    def _read(self, row: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        number = self._numbers.get(_key(row))
        if number is None:
            raise ValueError("a sequence is not in the teacher's cache; it holds the text that it was made from, only")
        shard, local = self._shards[number // self._per_shard], number % self._per_shard
        rows = slice(local, local + 1)
        return shard.read("indices", rows)[0], shard.read("log_probs", rows)[0], shard.read("log_tail", rows)[0]


def _check(folder: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """What cache.json says, if it agrees.

    Raises:
        ValueError: it does not.
    """
    stated = read_json(folder / _MANIFEST)
    if not isinstance(stated, dict) or set(stated) != set(_Made.__dataclass_fields__):
        raise ValueError(f"{folder / _MANIFEST} does not describe a teacher's cache; delete the folder")
    wrong = [key for key, value in wanted.items() if stated[key] != value]
    if wrong:
        raise ValueError(
            f"{folder} is the cache of another {wrong[0].removesuffix('_version')}; delete it, or take another folder"
        )
    return stated


def _shard(folder: Path, number: int) -> Path:
    return folder / f"targets-{number:05d}.safetensors"


def _key(row: Tensor) -> bytes:
    return row.to(torch.int64).contiguous().numpy().tobytes()

"""Where a model comes from: a local folder, a hub id or a GGUF file, behind one lazy interface."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from decoct.store.files import read_json, sha256
from decoct.store.safetensors_file import SafetensorsFile, open_safetensors

MANIFEST = "decoct.json"
"""A decoct checkpoint's own file: format version, a checksum for each shard, lineage."""

RUN_SUMMARY = "decoct-run.json"
"""Beside it: times, memory and errors of the run that wrote it."""

INDEX = "model.safetensors.index.json"
_EXTRA_SUFFIXES = (".json", ".model", ".txt", ".jinja", ".tiktoken")
_NOT_EXTRA = {"config.json", INDEX, MANIFEST, RUN_SUMMARY, "quantize_config.json"}
_HUB_PATTERNS = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken"]


class Source(Protocol):
    """A checkpoint, opened: the config and lazily read tensors."""

    @property
    def config(self) -> dict[str, Any]:
        """config.json."""

    @property
    def label(self) -> str:
        """What messages call it."""

    def names(self) -> Iterable[str]:
        """Every tensor's name."""

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""

    def dtype(self, name: str) -> torch.dtype:
        """A tensor's dtype as `read` gives it."""

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own."""

    def prefetch(self, names: Iterable[str]) -> None:
        """Have the system read tensors ahead, as far as it can, while something else is computed."""

    def fingerprint(self) -> str:
        """Changes when the checkpoint does; compared on resume."""

    def save_extras(self, folder: Path) -> None:
        """Write tokenizer and generation files to `folder`."""


@dataclass(frozen=True)
class FolderSource:
    """A folder of safetensors shards with a config.json."""

    folder: Path
    config: dict[str, Any]
    where: dict[str, SafetensorsFile]
    shards: tuple[SafetensorsFile, ...]

    @property
    def label(self) -> str:
        """The path, for messages."""
        return str(self.folder)

    def names(self) -> Iterable[str]:
        """Every tensor's name."""
        return self.where.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, from its shard's header."""
        return self.where[name].tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """A tensor's dtype, from its shard's header."""
        return self.where[name].tensors[name].dtype

    def read(self, name: str) -> Tensor:
        """One tensor.

        Raises:
            ValueError: the shard is truncated.
        """
        return self.where[name].read(name)

    def prefetch(self, names: Iterable[str]) -> None:
        """Ask for the tensors' pages; they count as the system's cache, not as this process's memory."""
        for name in names:
            self.where[name].prefetch(name)

    def fingerprint(self) -> str:
        """Checksums where decoct wrote them, else names, sizes and times of the shards: enough to notice a swap."""
        manifest = self.manifest()
        if manifest is not None:
            return ";".join(f"{name}:{digest}" for name, digest in manifest["shards"].items())
        stats = ((shard.path.name, shard.path.stat()) for shard in self.shards)
        return ";".join(f"{name}:{stat.st_size}:{stat.st_mtime_ns}" for name, stat in stats)

    def save_extras(self, folder: Path) -> None:
        """Copy tokenizer, chat template and generation settings."""
        for path in sorted(self.folder.iterdir()):
            if path.is_file() and path.suffix in _EXTRA_SUFFIXES and path.name not in _NOT_EXTRA:
                (folder / path.name).write_bytes(path.read_bytes())

    def manifest(self) -> dict[str, Any] | None:
        """decoct.json, if decoct wrote this folder."""
        path = self.folder / MANIFEST
        return read_json(path) if path.exists() else None

    def verify(self) -> None:
        """Compare every shard with the checksum in decoct.json, where there is one.

        Raises:
            ValueError: a shard differs; the message names it.
        """
        manifest = self.manifest()
        for name, digest in (manifest or {}).get("shards", {}).items():
            if sha256(self.folder / name) != digest:
                raise ValueError(
                    f"{self.folder / name} is corrupt: its checksum differs from {MANIFEST}; write it again"
                )


def open_source(model: str | Path) -> Source:
    """Open a local folder, a .gguf file, or a Hugging Face hub id (downloaded into the usual cache).

    Raises:
        ValueError: there is no such model, it holds no safetensors, or a shard is damaged.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return _open_folder(path)
    if path.suffix == ".gguf":
        from decoct.store.gguf_source import open_gguf

        return open_gguf(path)
    text = str(model)
    if path.exists() or text.startswith((".", "/", "~")) or text.count("/") != 1:
        raise ValueError(f"{model} is neither a model folder, a .gguf file, nor a hub id such as Qwen/Qwen3-0.6B")
    return _open_folder(_download(text))


def _open_folder(folder: Path) -> FolderSource:
    if not (folder / "config.json").exists():
        unfinished = (folder / ".run").exists()
        hint = (
            "its compression was interrupted; run the same command again to finish it"
            if unfinished
            else ("it is not a Hugging Face model folder")
        )
        raise ValueError(f"{folder} has no config.json; {hint}")
    config = read_json(folder / "config.json")
    if "model_type" not in config:
        raise ValueError(f"{folder / 'config.json'} has no model_type; it is damaged, or no model's config")
    promised = _weight_map(folder / INDEX)
    if promised:
        files = sorted(set(promised.values()))
    elif (folder / "model.safetensors").exists():
        files = ["model.safetensors"]  # other files beside it are copies in another layout
    else:
        files = sorted(path.name for path in folder.glob("*.safetensors"))
    if not files:
        pickled = any(path.suffix in (".bin", ".pt", ".pth") for path in folder.iterdir())
        hint = "only pickled weights, which can run code; convert them to safetensors first"
        if not pickled:
            hint = "no model.safetensors, nor shards; download the model again"
        raise ValueError(f"{folder} holds no safetensors weights ({hint})")
    shards = tuple(open_safetensors(folder / name) for name in files)
    where = {name: shard for shard in shards for name in shard.tensors}
    missing = [name for name in promised if name not in where]
    if missing:
        raise ValueError(f"{folder}: {INDEX} promises {missing[0]}, which is in no shard; download it again")
    return FolderSource(folder, config, where, shards)


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> shard, from a sharded checkpoint's index; empty if there is none."""
    if not index.exists():
        return {}
    value = read_json(index)
    weight_map = value.get("weight_map") if isinstance(value, dict) else None
    if not weight_map or not isinstance(weight_map, dict):
        raise ValueError(f"{index} has no weight_map; it is damaged, download it again")
    return {str(name): str(shard) for name, shard in weight_map.items()}


def _download(repo: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, allow_patterns=_HUB_PATTERNS))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{repo} is no local folder and could not be downloaded from the hub: {reason}") from None

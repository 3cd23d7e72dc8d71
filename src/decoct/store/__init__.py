"""Checkpoints on disk: lazy reading, atomic writing, checksums."""

from decoct.store.files import atomic_path, free_bytes, read_json, sha256, write_json
from decoct.store.safetensors_file import SafetensorsFile, open_safetensors, save_safetensors, tensor_bytes
from decoct.store.source import INDEX, MANIFEST, RUN_SUMMARY, FolderSource, Source, open_source

__all__ = [
    "INDEX", "MANIFEST", "RUN_SUMMARY", "FolderSource", "SafetensorsFile", "Source", "atomic_path", "free_bytes",
    "open_safetensors", "open_source", "read_json", "save_safetensors", "sha256", "tensor_bytes", "write_json",
]  # fmt: skip

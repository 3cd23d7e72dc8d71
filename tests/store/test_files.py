"""Files are whole or absent."""

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch

from decoct.store import atomic_path, free_bytes, read_json, save_safetensors, sha256, write_json


class Crash(BaseException):
    """Nothing may catch this."""


@pytest.mark.parametrize("before", [None, b"old"])
@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt, Crash])
def test_failure_leaves_things_as_they_were(before: bytes | None, error: type[BaseException], tmp_path: Path) -> None:
    path = tmp_path / "sub" / "file.bin"
    if before is not None:
        path.parent.mkdir()
        path.write_bytes(before)
    with pytest.raises(error), atomic_path(path) as partial:  # noqa: PT012 - one act: writing half of a file
        partial.write_bytes(b"half of the n")
        raise error
    assert [each.read_bytes() for each in path.parent.iterdir()] == ([] if before is None else [before])


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json(tmp_path / "x.json", {"old": 1})

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_json(tmp_path / "x.json", {"new": 2})
    with pytest.raises(OSError, match="No space"):
        save_safetensors(tmp_path / "y.safetensors", {"x": torch.zeros(3)})
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
    assert read_json(tmp_path / "x.json") == {"old": 1}


def test_success_replaces(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for value in ({"a": [1, None, "ü"]}, {"b": 2}):
        write_json(path, value)
        assert read_json(path) == value == json.loads(path.read_text(encoding="utf-8"))
    assert [each.name for each in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize("text", [b"", b'{"a": 1', b"{a: 1}", b'"\xff"'])
def test_damaged_json_names_the_file(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON.*damaged"):
        read_json(tmp_path / "config.json")
    with pytest.raises(ValueError, match=r"other\.json does not exist"):
        read_json(tmp_path / "other.json")


def test_sha256_and_free_bytes(tmp_path: Path) -> None:
    data = bytes(range(256)) * 20_000  # more than one chunk
    (tmp_path / "x").write_bytes(data)
    assert sha256(tmp_path / "x") == hashlib.sha256(data).hexdigest()
    assert free_bytes(tmp_path / "not" / "yet" / "there") > 0

"""Our reader against the library's, and every kind of damage as one sentence that names the file."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from decoct.store import open_safetensors, save_safetensors

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
]  # fmt: skip


def values(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 50
    return drawn > 0 if dtype == torch.bool else drawn.to(dtype)


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    x, y = (each.contiguous().reshape(-1).view(torch.uint8) for each in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(x, y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reads_what_the_library_reads(dtype: torch.dtype, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {f"t{n}": values(dtype, *shape) for n, shape in enumerate([(7, 5), (3,), (2, 3, 4), (), (0, 4), (1, 1)])}
    save_file(tensors, path, metadata={"format": "pt", "mine": "ü"})
    ours = open_safetensors(path)
    assert ours.metadata == {"format": "pt", "mine": "ü"}
    with safe_open(path, "pt") as theirs:
        assert ours.tensors.keys() == set(theirs.keys())
        for name, info in ours.tensors.items():
            expected = theirs.get_tensor(name)
            assert (info.dtype, info.shape, info.nbytes) == (dtype, tuple(expected.shape), expected.nbytes)
            assert same_bytes(ours.read(name), expected)


@pytest.mark.parametrize("rows", [slice(0, 0), slice(0, 7), slice(2, 5), slice(6, None), slice(-2, None), slice(5, 99)])
def test_row_ranges(rows: slice, tmp_path: Path) -> None:
    x = values(torch.bfloat16, 7, 3, 2)
    save_safetensors(tmp_path / "x.safetensors", {"before": values(torch.int8, 3), "x": x})
    opened = open_safetensors(tmp_path / "x.safetensors")
    assert same_bytes(opened.read("x", rows), x[rows])


def test_what_is_read_is_ours_to_change(tmp_path: Path) -> None:
    save_safetensors(tmp_path / "x.safetensors", {"x": torch.zeros(4)})
    opened = open_safetensors(tmp_path / "x.safetensors")
    opened.read("x").fill_(1.0)
    assert opened.read("x").sum() == 0


def test_written_by_us_read_by_the_library(tmp_path: Path) -> None:
    tensors = {"a": values(torch.float16, 4, 6).T, "b": values(torch.uint8, 3), "scalar": torch.tensor(2.0)}
    save_safetensors(tmp_path / "x.safetensors", tensors, {"key": "value"})
    with safe_open(tmp_path / "x.safetensors", "pt") as theirs:
        assert theirs.metadata() == {"format": "pt", "key": "value"}
        assert all(same_bytes(theirs.get_tensor(name), tensor) for name, tensor in tensors.items())


def test_same_tensors_same_bytes(tmp_path: Path) -> None:
    """The library's own order of metadata keys varies; checksums and bit-identical results need one order."""
    for number in range(20):
        metadata = {"b": "2", "a": "1", "decoct": "{}"}
        save_safetensors(tmp_path / "x.safetensors", {"x": torch.zeros(3), "y": torch.ones(2)}, metadata)
        (tmp_path / "x.safetensors").replace(tmp_path / f"{number}.bin")
    assert len({path.read_bytes() for path in tmp_path.glob("*.bin")}) == 1


def header(value: Any, body: bytes = b"") -> bytes:
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    return len(text).to_bytes(8, "little") + text + body


ENTRY = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
WHOLE = header({"x": ENTRY}, bytes(16))
DAMAGED = {
    "empty": b"",
    "seven bytes": b"1234567",
    "a header longer than the file": (10**6).to_bytes(8, "little") + b"{}",
    "an absurd header length": b"\xff" * 8 + bytes(100),
    "a pickle": b"\x80\x02}q\x00X\x01\x00\x00\x00ab." * 20,
    "text": b"version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 99\n",
    "a header that is no JSON": header(b"{'x': 1}"),
    "a header that is no UTF-8": header(b'{"\xff": 1}'),
    "truncated": WHOLE[:-1],
    "overlong": WHOLE + b"\0",
    "a header that is a list": header([1, 2]),
    "an entry that is a number": header({"x": 1}),
    "an entry without dtype": header({"x": {"shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
    "an entry without offsets": header({"x": {"dtype": "F32", "shape": [1]}}, bytes(4)),
    "an unknown dtype": header({"x": {**ENTRY, "dtype": "F4"}}, bytes(16)),
    "a shape that needs more bytes": header({"x": {**ENTRY, "shape": [2, 3]}}, bytes(16)),
    "offsets before the data": header({"x": {**ENTRY, "data_offsets": [-16, 0]}}),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damage_names_the_file(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "model-00001-of-00002.safetensors"
    path.write_bytes(DAMAGED[damage])
    with pytest.raises(ValueError, match=r"model-00001-of-00002\.safetensors"):
        open_safetensors(path)


def test_the_undamaged_one_opens(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(WHOLE)
    assert open_safetensors(path).read("x").tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_missing_and_shrunk_after_opening(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(ValueError, match=r"x\.safetensors does not exist"):
        open_safetensors(path)
    path.write_bytes(WHOLE)
    opened = open_safetensors(path)
    path.write_bytes(WHOLE[:-8])
    with pytest.raises(ValueError, match=r"x\.safetensors ends inside tensor x"):
        opened.read("x")

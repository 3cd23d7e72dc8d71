"""Weights through JSON text and a safetensors file, and what is said when the two do not fit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from decoct.store import open_safetensors, save_safetensors
from decoct.weights import (
    FORMAT_VERSION,
    WEIGHTS,
    Shared,
    Sum,
    Weight,
    check_version,
    describe,
    described_dtype,
    rebuild,
    tensor_specs,
)
from tests.weights.samples import dense, group_int, low_rank, samples

SAMPLES = samples()
EVERY = pytest.mark.parametrize("weight", SAMPLES.values(), ids=SAMPLES.keys())


def nested() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    weight = Sum.of(group_int(bits=3, symmetric=False), low_rank())
    return describe(weight), weight.tensors()


@EVERY
def test_round_trip_through_text_and_file_is_bit_identical(weight: Weight, tmp_path: Path) -> None:
    text = json.dumps(describe(weight))
    save_safetensors(tmp_path / "w.safetensors", weight.tensors())
    file = open_safetensors(tmp_path / "w.safetensors")
    again = rebuild(json.loads(text), {name: file.read(name) for name in file.tensors})
    assert type(again) is type(weight)
    assert (again.shape, again.dtype, again.nbytes) == (weight.shape, weight.dtype, weight.nbytes)
    assert json.dumps(describe(again)) == text
    stored = weight.tensors()
    assert again.tensors().keys() == stored.keys()
    for name, tensor in again.tensors().items():
        assert tensor.dtype == stored[name].dtype
        assert torch.equal(tensor, stored[name])
    if not isinstance(weight, Shared):
        assert torch.equal(again.unpack(), weight.unpack())
        assert torch.equal(again.unpack_rows(slice(0, 1)), weight.unpack_rows(slice(0, 1)))


@EVERY
def test_specs_and_dtype_are_those_of_the_tensors(weight: Weight) -> None:
    description = json.loads(json.dumps(describe(weight)))
    assert tensor_specs(description) == {n: (t.dtype, list(t.shape)) for n, t in weight.tensors().items()}
    assert described_dtype(description) == weight.dtype


def test_a_shared_weight_forgets_its_owner_until_resolved() -> None:
    weight = rebuild(describe(Shared.of("a.weight", dense())), {})
    assert isinstance(weight, Shared)
    assert (weight.target, weight.owner, weight.shape) == ("a.weight", None, dense().shape)


def test_tensors_of_other_weights_do_not_disturb() -> None:
    description, tensors = nested()
    more = tensors | {"terms.10.values": torch.zeros(1), "codes": torch.zeros(1), "other": torch.zeros(1)}
    assert torch.equal(rebuild(description, more).unpack(), rebuild(description, tensors).unpack())


@pytest.mark.parametrize("name", ["terms.0.codes", "terms.0.zero", "terms.1.left.values"])
def test_a_missing_tensor_is_named(name: str) -> None:
    description, tensors = nested()
    del tensors[name]
    with pytest.raises(ValueError, match=rf"^3\.mlp\.down\.{name} is missing from the checkpoint"):
        rebuild(description, tensors, "3.mlp.down")


@pytest.mark.parametrize("name", ["terms.0.scale", "terms.1.right.values"])
def test_another_shape_or_dtype_is_named(name: str) -> None:
    description, tensors = nested()
    right = tensors[name]
    for wrong in (right[:-1], right.T, right.double(), right.unsqueeze(0)):
        with pytest.raises(ValueError, match=rf"^lm_head\.{name} is .* in the checkpoint, but described") as found:
            rebuild(description, tensors | {name: wrong}, "lm_head")
        assert f"{right.dtype} {list(right.shape)}" in str(found.value)
        assert f"{wrong.dtype} {list(wrong.shape)}" in str(found.value)


@pytest.mark.parametrize("kind", ["Origami", None, 3])
def test_an_unknown_kind_lists_the_known_ones(kind: object) -> None:
    description, tensors = nested()
    description["terms"][1]["kind"] = kind
    with pytest.raises(ValueError, match=r"w\.terms\.1: unknown kind of weight .*GroupInt") as found:
        rebuild(description, tensors, "w")
    assert all(name in str(found.value) for name in WEIGHTS)


def test_a_description_without_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown kind of weight None"):
        rebuild({}, {})


@pytest.mark.parametrize("key", ["bits", "shape", "dtype", "scale"])
def test_a_description_that_lacks_a_field_is_refused(key: str) -> None:
    weight = group_int()
    description = describe(weight)
    del description[key]
    with pytest.raises(ValueError, match=key):
        rebuild(description, weight.tensors())


@pytest.mark.parametrize("dtype", ["float17", "nn", ""])
def test_an_unknown_dtype_is_refused(dtype: str) -> None:
    weight = dense()
    description = describe(weight)
    description["values"]["tensor"] = dtype
    with pytest.raises(ValueError, match=f"unknown dtype '{dtype}'"):
        rebuild(description, weight.tensors())


def test_a_newer_format_is_refused() -> None:
    check_version(FORMAT_VERSION, "file")
    with pytest.raises(ValueError, match=rf"^file: written in format {FORMAT_VERSION + 1}, .* upgrade decoct"):
        check_version(FORMAT_VERSION + 1, "file")
    for none in (None, "1", 0, -1, 1.0):
        with pytest.raises(ValueError, match=r"^file: no format version"):
            check_version(none, "file")


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_safetensors(path, group_int().tensors())
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="truncated"):
        open_safetensors(path)

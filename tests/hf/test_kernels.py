"""`decoct.load` gives transformers' model with kernels in it: the same logits, nothing unpacked."""

from pathlib import Path

import pytest
import torch

import decoct
from decoct.model import open_model
from decoct.native.library import library
from decoct.runtime import kernels_of
from tests.arch.test_families import our_logits
from tests.hf.test_from_pretrained import QUANTIZE, compress
from tests.tiny import save_model


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "mixtral"])
@torch.no_grad()
def test_a_loaded_model_runs_by_kernels(name: str, tmp_path: Path) -> None:
    save_model(name, tmp_path / "base")
    compress(tmp_path / "base", tmp_path / "out", QUANTIZE)
    model = decoct.load(tmp_path / "out", dtype=torch.float32)
    found = kernels_of(model)
    assert found
    if library() is not None:
        assert set(found.values()) <= {"ints 4", "dense"}
    tokens = torch.randint(3, 96, (1, 12), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        model(tokens).logits, our_logits(open_model(tmp_path / "out"), tokens), rtol=1e-4, atol=1e-4
    )


@torch.no_grad()
def test_uncompressed_matrices_are_read_where_they_are(tmp_path: Path) -> None:
    base = save_model("llama", tmp_path / "base")
    model = decoct.load(tmp_path / "base", dtype=torch.float32)
    assert len(kernels_of(model)) == 3 * 7 + 1
    tokens = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(model(tokens).logits, base(tokens).logits, rtol=1e-4, atol=1e-4)

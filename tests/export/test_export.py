"""Exports are loaded by the engine they are for, without decoct, and give our logits."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from decoct.exporters import export_model
from decoct.model import open_model
from tests.arch.test_families import our_logits
from tests.hf.test_from_pretrained import compress
from tests.tiny import save_model

LOAD = """
import sys, torch, warnings
from transformers import AutoModelForCausalLM, CompressedTensorsConfig
# transformers 5.23 with compressed-tensors 0.20 cannot keep asymmetric weights packed; it can unpack them on loading.
asymmetric = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if sys.argv[4] == "asymmetric" else {}
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, **asymmetric)
assert "decoct" not in sys.modules
with torch.no_grad():
    torch.save(model(torch.load(sys.argv[2])).logits.float(), sys.argv[3])
"""
SCHEMES = {
    "4 bit groups": {"bits": 4, "group_size": 8},
    "3 bit groups": {"bits": 3, "group_size": 16},
    "8 bit channel": {"bits": 8, "group_size": "channel"},
    "4 bit asymmetric": {"bits": 4, "group_size": 16, "symmetric": False},
    "8 bit tensor": {"bits": 8, "group_size": "tensor"},
}


def foreign_logits(folder: Path, tokens: torch.Tensor, scratch: Path, *, symmetric: bool = True) -> torch.Tensor:
    torch.save(tokens, scratch / "tokens.pt")
    command = [sys.executable, "-c", LOAD, str(folder), str(scratch / "tokens.pt"), str(scratch / "logits.pt")]
    command.append("symmetric" if symmetric else "asymmetric")
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "UNEXPECTED" not in done.stderr
    assert "MISSING" not in done.stderr
    return torch.load(scratch / "logits.pt")


@pytest.mark.parametrize("scheme", SCHEMES)
@torch.no_grad()
def test_compressed_tensors_in_transformers(scheme: str, tmp_path: Path) -> None:
    save_model("llama", tmp_path / "base")
    compress(tmp_path / "base", tmp_path / "out", [{"linear": {"rtn": SCHEMES[scheme]}}])
    model = open_model(tmp_path / "out")
    export_model(model, "compressed_tensors", tmp_path / "ct")
    tokens = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(1))
    symmetric = SCHEMES[scheme].get("symmetric", True)
    theirs = foreign_logits(tmp_path / "ct", tokens, tmp_path, symmetric=symmetric)
    # Unpacked on use, weights are in the model's dtype; unpacked on loading, in the stored scales'.
    ours = our_logits(model, tokens, unpack=torch.float32 if symmetric else torch.bfloat16)
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_dense_in_transformers(tmp_path: Path) -> None:
    save_model("gpt2", tmp_path / "base")
    compress(
        tmp_path / "base",
        tmp_path / "out",
        [{"linear": {"match": ["embed", "*"], "rtn": {"bits": 4, "group_size": 8}}}],
    )
    model = open_model(tmp_path / "out")
    export_model(model, "dense", tmp_path / "dense")
    tokens = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(1))
    theirs = foreign_logits(tmp_path / "dense", tokens, tmp_path)
    torch.testing.assert_close(theirs, our_logits(model, tokens), rtol=1e-4, atol=1e-5)
    assert open_model(tmp_path / "dense").described == {}


def test_refusals_say_what_to_do(tmp_path: Path) -> None:
    save_model("llama-tied", tmp_path / "base")
    compress(tmp_path / "base", tmp_path / "out", [{"linear": {"match": "embed", "rtn": {"bits": 8, "group_size": 8}}}])
    model = open_model(tmp_path / "out")
    with pytest.raises(ValueError, match=r"embed_tokens\.weight: it is a quantized embed.*--fold"):
        export_model(model, "compressed_tensors", tmp_path / "ct")
    with pytest.raises(ValueError, match="did you mean compressed_tensors"):
        export_model(model, "compressed-tensor", tmp_path / "ct")
    compress(
        tmp_path / "base", tmp_path / "mixed", [{"linear": [{"match": "attn.q", "rtn": {"bits": 8, "group_size": 8}}]}]
    )
    with pytest.raises(ValueError, match=r"attn.q, attn.k, attn.v have different schemes"):
        export_model(open_model(tmp_path / "mixed"), "compressed_tensors", tmp_path / "ct")

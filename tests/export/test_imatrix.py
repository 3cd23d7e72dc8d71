"""The importance matrix: figures of a float64 model with hooks of its own, read back with the gguf package."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import decoct
import decoct.engine.squares
from decoct.engine.data import Data, load_tokens
from decoct.exporters.imatrix import gguf_names, make_imatrix, read_imatrix
from decoct.model import open_model
from tests.cli.test_commands import invoke
from tests.engine.running import make_base, run

WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "num_hidden_layers": 2}


def data_of(base: Path) -> Data:
    return Data(source=str(base.parent / "text.txt"), num_sequences=6, sequence_length=16)


@torch.no_grad()
def reference(base: Path, data: Data) -> dict[str, np.ndarray]:
    """Mean squares of every linear layer's inputs, from hooks on a float64 model, a sequence at a time."""
    network: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    sums: dict[str, np.ndarray] = {}
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Linear):
            sums[f"{name}.weight"] = np.zeros(module.in_features)

            def add(_: Any, given: tuple[torch.Tensor, ...], name: str = f"{name}.weight") -> None:
                for row in given[0].reshape(-1, given[0].shape[-1]).numpy():
                    sums[name] += row**2

            module.register_forward_pre_hook(add)
    for row in load_tokens(data, open_model(base), lambda _: None):
        network(row.unsqueeze(0))
    return {name: total / data.num_tokens for name, total in sums.items()}


def as_llama_cpp_reads(path: Path) -> dict[str, np.ndarray]:
    """Its quantizer's way: sums by counts, whose names are those of the model's tensors."""
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    found = {}
    for name, tensor in tensors.items():
        if name.endswith(".in_sum2"):
            counts = tensors[name.replace(".in_sum2", ".counts")]
            assert (tensor.tensor_type.name, counts.tensor_type.name) == ("F32", "F32")
            assert list(tensor.shape)[1:] == [1]
            assert list(counts.shape) == [1, 1]
            found[name.removesuffix(".in_sum2")] = tensor.data.reshape(-1) / counts.data.reshape(-1)
    assert len(tensors) == 2 * len(found)
    return found


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "phi3", "llama-tied"])
def test_figures_are_those_of_float64(name: str, tmp_path: Path) -> None:
    more = {"query_pre_attn_scalar": 16} if name == "gemma2" else {"sliding_window": None} if name == "phi3" else {}
    base = make_base(tmp_path, name, **{**WIDE, **more})
    data = data_of(base)
    made = make_imatrix(open_model(base), data, tmp_path / "imatrix.gguf")
    wanted, found = reference(base, data), as_llama_cpp_reads(tmp_path / "imatrix.gguf")
    names = gguf_names(open_model(base))
    tied = open_model(base).tied
    assert made.check.ok
    assert made.matrices == len(found) == len(wanted) - tied
    for ours, means in wanted.items():
        if not (tied and ours == "lm_head.weight"):
            np.testing.assert_allclose(found[names[ours][0]], means, rtol=2e-5)


def test_the_file_says_what_text_it_was(tmp_path: Path) -> None:
    base = make_base(tmp_path, "llama", **WIDE)
    data = data_of(base)
    make_imatrix(open_model(base), data, tmp_path / "imatrix.gguf")
    fields = gguf.GGUFReader(tmp_path / "imatrix.gguf").fields
    said = {key: fields[key].contents() for key in fields}
    assert said["general.type"] == "imatrix"
    assert said["imatrix.datasets"] == [data.source]
    assert (said["imatrix.chunk_count"], said["imatrix.chunk_size"]) == (6, 16)
    assert read_imatrix(tmp_path / "imatrix.gguf").keys() == {
        *(f"blk.{i}.{m}.weight" for i in (0, 1) for m in (
            "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"
        )),
        "output.weight",
    }  # fmt: skip


def test_states_in_a_file_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base(tmp_path, "llama", **WIDE)
    data = data_of(base)
    make_imatrix(open_model(base), data, tmp_path / "memory.gguf")
    monkeypatch.setattr(decoct.engine.squares, "_SHARE", 0.0)
    make_imatrix(open_model(base), data, tmp_path / "file.gguf")
    assert (tmp_path / "memory.gguf").read_bytes() == (tmp_path / "file.gguf").read_bytes()
    assert not list(tmp_path.glob(".states-*"))


def test_a_compressed_model_is_run_as_it_is(tmp_path: Path) -> None:
    base = make_base(tmp_path, "llama", **WIDE)
    out = run(base, tmp_path / "out", {"linear": {"match": "0.*", "rtn": {"bits": 2, "group_size": 32}}}).folder
    data = data_of(base)
    for folder in (base, out):
        make_imatrix(open_model(folder), data, tmp_path / f"{folder.name}.gguf")
    before, after = (read_imatrix(tmp_path / f"{name}.gguf") for name in ("base", "out"))
    assert torch.equal(before["blk.0.attn_q.weight"], after["blk.0.attn_q.weight"])
    assert not torch.allclose(before["blk.1.attn_q.weight"], after["blk.1.attn_q.weight"], rtol=0.01)


def test_on_the_command_line(tmp_path: Path) -> None:
    base = make_base(tmp_path, "llama", **WIDE)
    small = ["--sequences", "4", "--length", "16"]
    text, out = tmp_path / "text.txt", tmp_path / "imatrix.gguf"
    result = invoke("imatrix", base, "--data", text, "-o", out, *small)
    assert result.exit_code == 0, result.output
    assert "15 matrices, 64 tokens" in result.stdout
    assert "values: ok; 15 matrices read back" in result.stdout
    again = invoke("imatrix", base, "--data", text, "-o", out, *small)
    assert (again.exit_code, again.stderr.count("\n")) == (1, 1)
    assert "is there already; choose another name" in again.stderr
    said = json.loads(invoke("imatrix", base, "--data", text, "-o", tmp_path / "b.gguf", *small, "--json").stdout)
    assert (said["matrices"], said["starved"], said["tokens"]) == (15, [], 64)
    missing = invoke("imatrix", base, "--data", tmp_path / "no.txt", "-o", tmp_path / "c.gguf", *small)
    assert missing.exit_code == 1
    assert not (tmp_path / "c.gguf").exists()
    other = make_base(tmp_path / "other", "gpt2")
    refused = invoke("imatrix", other, "--data", text, "-o", tmp_path / "d.gguf", *small)
    assert "a gpt2 model cannot be written as GGUF yet" in refused.stderr


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist; `decoct imatrix` makes one"):
        read_imatrix(tmp_path / "none.gguf")
    (tmp_path / "bad.gguf").write_bytes(b"no such thing" * 10)
    with pytest.raises(ValueError, match="is no GGUF file"):
        read_imatrix(tmp_path / "bad.gguf")


def test_types_are_fitted_to_what_matters(tmp_path: Path) -> None:
    """The error of what was fitted is smaller where inputs count, and larger if all are counted alike."""
    base = make_base(tmp_path, "llama", **WIDE)
    model, path = open_model(base), tmp_path / "imatrix.gguf"
    make_imatrix(model, data_of(base), path)
    means = read_imatrix(path)["blk.0.ffn_down.weight"].double()
    ours = model.weight("model.layers.0.mlp.down_proj.weight").unpack(torch.float64)
    errors = {}
    for given in (None, path):
        out = tmp_path / f"{given is None}.gguf"
        decoct.export(base, "gguf:q4_0", out, load=False, imatrix=given)
        (tensor,) = (t for t in gguf.GGUFReader(out).tensors if t.name == "blk.0.ffn_down.weight")
        theirs = torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type)).double()
        errors[given is None] = [float(((theirs - ours) ** 2 * by).sum()) for by in (means, torch.ones_like(means))]
    (counted, alike), (counted_before, alike_before) = errors[False], errors[True]
    assert counted < 0.97 * counted_before
    assert alike > alike_before


def test_importance_of_something_else_is_refused(tmp_path: Path) -> None:
    base, path = make_base(tmp_path, "llama", **WIDE), tmp_path / "imatrix.gguf"
    make_imatrix(open_model(base), data_of(base), path)
    other = make_base(tmp_path / "other", "llama", **{**WIDE, "hidden_size": 32, "head_dim": 8})
    with pytest.raises(ValueError, match=r"is of another model: blk\.0\.attn_q\.weight has 32 input features here"):
        decoct.export(other, "gguf:q4_0", tmp_path / "m.gguf", imatrix=path)
    for form in ("gguf", "dense"):
        with pytest.raises(ValueError, match=f"not for {form}; leave it out"):
            decoct.export(base, form, tmp_path / "m.gguf", imatrix=path)
    with pytest.raises(ValueError, match="does not exist; `decoct imatrix` makes one"):
        decoct.export(base, "gguf:q4_0", tmp_path / "m.gguf", imatrix=tmp_path / "none.gguf")

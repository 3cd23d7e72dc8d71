"""GGUF files, read by the gguf package and run by llama.cpp, beside the model that they were made of."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from tokenizers import Regex as Pattern
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

import decoct
from decoct.exporters import ExportReport, export_model, report_path
from decoct.exporters.gguf.vocabulary import vocabulary_of
from decoct.exporters.in_llama_cpp import LlamaCpp
from decoct.model import open_model
from tests.cli.test_commands import invoke
from tests.engine.running import make_base, run
from tests.tiny import make_model

WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
GEMMA = {**WIDE, "query_pre_attn_scalar": 16}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": WIDE, "llama-tied": {**WIDE, "attention_bias": True}, "mistral": {**WIDE, "sliding_window": None},
    "qwen2": WIDE, "qwen3": WIDE, "gemma2": GEMMA, "gemma3_text": GEMMA, "olmo2": WIDE,
    "phi3": {**WIDE, "sliding_window": None, "pad_token_id": 0},
}  # fmt: skip


def types_of(path: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}


def all_ok(report: ExportReport) -> None:
    """Nothing differs, and everything was looked at."""
    assert [check for check in report.checks if check.ok is not True] == []
    assert {"tensors", "tokenizer", "load"} < {check.name for check in report.checks}


@pytest.mark.parametrize("name", FAMILIES)
def test_families_run_in_llama_cpp(name: str, tmp_path: Path) -> None:
    """Rotary positions, norms, biases, soft caps and windows as transformers has them."""
    base = make_base(tmp_path, name, **FAMILIES[name])
    report = export_model(open_model(base), "gguf", tmp_path / "m.gguf")
    all_ok(report)
    (logits,) = (check.detail for check in report.checks if check.name == "logits")
    assert float(logits.split()[1]) < 1e-4
    assert set(types_of(tmp_path / "m.gguf").values()) == {"F32"}


INTEGERS: dict[str, tuple[dict[str, Any], str]] = {
    "4 bits": ({"bits": 4, "group_size": 32}, "Q4_0"),
    "4 bits, groups of 64": ({"bits": 4, "group_size": 64}, "Q4_0"),
    "a whole row": ({"bits": 4, "group_size": "channel"}, "Q4_0"),
    "one scale": ({"bits": 8, "group_size": "tensor"}, "Q8_0"),
    "4 bits with zero points": ({"bits": 4, "group_size": 32, "symmetric": False}, "Q4_1"),
    "3 bits with zero points": ({"bits": 3, "group_size": 32, "symmetric": False}, "Q4_0"),
    "2 bits": ({"bits": 2, "group_size": 32}, "Q4_0"),
    "5 bits": ({"bits": 5, "group_size": 32}, "Q5_0"),
    "5 bits with zero points": ({"bits": 5, "group_size": 32, "symmetric": False}, "Q5_1"),
    "6 bits": ({"bits": 6, "group_size": 32}, "Q8_0"),
    "8 bits": ({"bits": 8, "group_size": 32}, "Q8_0"),
}


@pytest.mark.parametrize("what", INTEGERS)
def test_integers_are_written_as_they_are(what: str, tmp_path: Path) -> None:
    base = make_base(tmp_path, "llama", **WIDE, num_hidden_layers=1)
    settings, kind = INTEGERS[what]
    out = run(base, tmp_path / "out", {"linear": {"match": ["embed", "*"], "rtn": settings}}).folder
    report = decoct.export(out, "gguf", tmp_path / "m.gguf", load=False)
    (values,) = (check for check in report.checks if check.name == "exact values")
    assert values.ok
    types = types_of(tmp_path / "m.gguf")
    assert {types[name] for name in types if name.startswith("blk") and "norm" not in name} == {kind}
    assert types["token_embd.weight"] == kind
    assert types["blk.0.attn_norm.weight"] == types["output_norm.weight"] == types["output.weight"] == "F32"


OTHERS: dict[str, tuple[dict[str, Any], str, int]] = {
    "hqq": ({"hqq": {"group_size": 32}}, "Q4_1", 128),
    "mxfp4": ({"mxfp": {"format": "mxfp4"}}, "MXFP4", 128),
    "ternary in small groups": ({"ternary": {"group_size": 32}}, "Q4_0", 128),
    "ternary": ({"ternary": {"group_size": 256}}, "TQ1_0", 256),
}


@pytest.mark.parametrize("what", OTHERS)
def test_other_weights_have_types_too(what: str, tmp_path: Path) -> None:
    method, kind, width = OTHERS[what]
    base = make_base(
        tmp_path, "llama", **{**WIDE, "hidden_size": width, "intermediate_size": width}, num_hidden_layers=1
    )
    out = run(base, tmp_path / "out", {"linear": {"match": "mlp.*", **method}}).folder
    report = decoct.export(out, "gguf", tmp_path / "m.gguf")
    all_ok(report)
    types = types_of(tmp_path / "m.gguf")
    assert {types[f"blk.0.ffn_{name}.weight"] for name in ("gate", "up", "down")} == {kind}


def test_pruned_integers_stay_pruned(tmp_path: Path) -> None:
    base = make_base(tmp_path, "llama", **WIDE, num_hidden_layers=1)
    rtn = {"linear": {"rtn": {"bits": 4, "group_size": 32}}}
    out = run(base, tmp_path / "out", {"linear": {"wanda": {}}}, rtn).folder
    report = decoct.export(out, "gguf", tmp_path / "m.gguf", load=False)
    assert report.ok
    weight = open_model(out).weight("model.layers.0.mlp.up_proj.weight").unpack()
    (tensor,) = (t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors if t.name == "blk.0.ffn_up.weight")
    written = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    assert ((written == 0) == (weight == 0).numpy()).all()
    assert 0.45 < (written == 0).mean() < 0.75


def test_a_trained_model_in_the_usual_types(stories: Path, tmp_path: Path) -> None:
    """Text and probabilities of a real model, with a sentencepiece vocabulary."""
    small = {"match": ["embed", "attn.*", "mlp.gate", "mlp.up"], "rtn": {"bits": 4, "group_size": 32}}
    out = decoct.compress(stories, {"stages": [{"blocks": [{"linear": small}]}]}, tmp_path / "out").folder
    texts = {}
    for model, to in ((stories, "gguf:f16"), (stories, "gguf:q8_0"), (stories, "gguf:q4_k_m"), (out, "gguf:q4_0")):
        path = tmp_path / f"{to[5:]}.gguf"
        report = decoct.export(model, to, path)
        all_ok(report)
        assert json.loads(report_path(path).read_text())["ok"]
        texts[to] = report.text
    assert texts["gguf:f16"].startswith(" a little girl named Lily. She loved to play")
    assert texts["gguf:q8_0"][:30] == texts["gguf:f16"][:30]
    types = types_of(tmp_path / "q4_k_m.gguf")
    assert (types["token_embd.weight"], types["blk.0.attn_q.weight"]) == ("Q8_0", "Q5_0")  # rows of 64, not of 256
    assert types["blk.0.ffn_down.weight"] == "F16"  # rows of 172
    types = types_of(tmp_path / "q4_0.gguf")
    assert (types["token_embd.weight"], types["blk.3.ffn_up.weight"]) == ("Q4_0", "Q4_0")


KINDS = {"gguf:q2_k": "Q2_K", "gguf:q3_k_s": "Q3_K", "gguf:q4_k_s": "Q4_K", "gguf:q5_k_s": "Q5_K", "gguf:q6_k": "Q6_K"}


@pytest.mark.parametrize("to", KINDS)
def test_super_blocks_are_fitted_to_what_there_is(to: str, tmp_path: Path) -> None:
    """Whatever a matrix is (here factors), llama.cpp gets the nearest, and computes with it what we do."""
    base = make_base(tmp_path, "llama", **{**WIDE, "hidden_size": 256, "intermediate_size": 256}, num_hidden_layers=1)
    out = run(base, tmp_path / "out", {"linear": {"match": "mlp.up", "svd_llm": {"keep": 0.9}}}).folder
    report = decoct.export(out, to, tmp_path / "m.gguf")
    all_ok(report)
    types = types_of(tmp_path / "m.gguf")
    assert types["blk.0.ffn_up.weight"] == types["blk.0.attn_q.weight"] == KINDS[to]


def test_refusals_name_what_holds_it(tmp_path: Path) -> None:
    base = make_base(tmp_path, "llama", **WIDE, num_hidden_layers=1)
    uneven = run(base, tmp_path / "u", {"linear": {"rtn": {"group_size": 32, "symmetric": False}}}).folder
    with pytest.raises(
        ValueError, match=r"4-bit integers, with zero points, .* use gguf:q4_1, which holds it, or add --f"
    ):
        decoct.export(uneven, "gguf:q4_0", tmp_path / "m.gguf")
    assert decoct.export(uneven, "gguf:q4_0", tmp_path / "m.gguf", fold=True, load=False).ok
    fine = run(base, tmp_path / "f", {"linear": {"rtn": {"group_size": 16}}}).folder
    with pytest.raises(
        ValueError, match=r"in groups of 16: GGUF has no type .* use groups of a multiple of 32, or gguf:q4"
    ):
        decoct.export(fine, "gguf", tmp_path / "n.gguf")
    assert decoct.export(fine, "gguf", tmp_path / "n.gguf", fold=True, load=False).ok
    rounded = run(base, tmp_path / "r", {"linear": {"rtn": {"group_size": 32}}}, {"linear": {"inputs": {}}}).folder
    with pytest.raises(ValueError, match=r"GGUF cannot say that the inputs of .* are rounded; add --fold"):
        decoct.export(rounded, "gguf", tmp_path / "r.gguf")
    with pytest.raises(ValueError, match="did you mean gguf:q4_k_"):
        decoct.export(fine, "gguf:q4_k", tmp_path / "r.gguf")
    with pytest.raises(ValueError, match=r"m\.gguf is there already"):
        decoct.export(base, "gguf", tmp_path / "m.gguf")
    other = make_base(tmp_path / "other", "gpt2")
    with pytest.raises(ValueError, match=r"a gpt2 model cannot be written as GGUF yet \(only llama, "):
        decoct.export(other, "gguf", tmp_path / "r.gguf")
    (base / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"GGUF needs the tokenizer in the file, and it has no tokenizer\.json"):
        decoct.export(base, "gguf", tmp_path / "r.gguf")


def test_a_recipe_writes_the_file_beside_its_result(tmp_path: Path) -> None:
    base = make_base(tmp_path, "llama", **WIDE, num_hidden_layers=1)
    recipe = {"stages": [{"blocks": [{"linear": {"rtn": {"group_size": 32}}}]}], "export": ["gguf", "gguf:q8_0"]}
    out = decoct.compress(base, recipe, tmp_path / "out").folder
    assert {"gguf.gguf", "gguf-q8_0.gguf", "gguf.gguf.report.json"} <= {path.name for path in out.iterdir()}
    stamp = (out / "gguf.gguf").stat().st_mtime_ns
    (out / "gguf-q8_0.gguf.report.json").unlink()
    decoct.compress(base, recipe, tmp_path / "out")
    assert (out / "gguf.gguf").stat().st_mtime_ns == stamp, "what is finished is left as it is"
    assert (out / "gguf-q8_0.gguf.report.json").exists(), "what is not is written again"


def test_a_difference_is_told_and_nothing_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries and keys that are not permuted: the file loads, and is wrong."""
    base = make_base(tmp_path, "llama", **WIDE, num_hidden_layers=1)
    monkeypatch.setattr("decoct.exporters.gguf.write.GgufPlan._permuted_heads", lambda self, source: None)
    result = invoke("export", base, "--to", "gguf", "-o", tmp_path / "m.gguf", "--json")
    assert result.exit_code == 1
    assert "m.gguf was written, but differs: logits: KL" in result.stderr
    found = json.loads(result.stdout)
    assert not found["ok"]
    assert [check["name"] for check in found["checks"] if check["ok"] is False] == ["logits"]
    assert (tmp_path / "m.gguf").exists()
    assert not json.loads(report_path(tmp_path / "m.gguf").read_text())["ok"]


def test_a_file_that_llama_cpp_does_not_load(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(200))
    with pytest.raises(ValueError, match=r"llama\.cpp does not load .*bad\.gguf: .*error"):
        LlamaCpp(tmp_path / "bad.gguf")


def test_where_llama_cpp_is_missing_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base(tmp_path, "llama", **WIDE, num_hidden_layers=1)
    monkeypatch.setattr("decoct.exporters.gguf.verify.find_spec", lambda _: None)
    report = decoct.export(base, "gguf", tmp_path / "m.gguf")
    assert report.ok
    (load,) = (check for check in report.checks if check.name == "load")
    assert load.ok is None
    assert "pip install 'decoct[llama-cpp]'" in load.detail


QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEXT = "It's 1984, Zoë sold 12345 crêpes!\n\n\tDon't  you THINK?"


@pytest.mark.parametrize("split", ["gpt-2", "smollm", "qwen2", "llama-bpe"])
def test_byte_level_tokenizers(split: str, tmp_path: Path) -> None:
    """Text is split as transformers splits it before bytes are merged."""
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split in ("gpt-2", "smollm"))
    before: Any = {
        "gpt-2": level,
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), level]),
        "qwen2": pre_tokenizers.Sequence([pre_tokenizers.Split(Pattern(QWEN), "isolated"), level]),
        "llama-bpe": pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Pattern(QWEN.replace(r"\p{N}|", r"\p{N}{1,3}|")), "isolated"), level]
        ),
    }[split]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("1", "2"), ("3", "4"), ("12", "34"), ("Ġ", "Ġ"), ("Ċ", "Ċ"), ("Ã", "«"), ("Ġ", "1"), ("'", "t")]
    tokens = ["<pad>", "<s>", "</s>", *alphabet, *(left + right for left, right in merges)]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = before
    tokenizer.add_special_tokens(["<pad>", "<s>", "</s>"])
    model = make_model("llama", **WIDE, vocab_size=len(tokens) + 5, num_hidden_layers=1)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save(str(tmp_path / "base" / "tokenizer.json"))
    assert vocabulary_of(json.loads(tokenizer.to_str()), len(tokens)).split == split
    all_ok(export_model(open_model(tmp_path / "base"), "gguf", tmp_path / "m.gguf"))
    with LlamaCpp(tmp_path / "m.gguf") as engine:
        assert engine.tokenize(TEXT) == tokenizer.encode(TEXT).ids


def test_gemma_tokenizers_put_no_space_before_the_text(tmp_path: Path) -> None:
    pieces = ["▁", *"Itsoldcrepaynk'THINK198234,!?", "▁s", "ol", "ld", "old", "sold", "▁sold"]
    names = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{i:02X}>" for i in range(256)), *dict.fromkeys(pieces)]
    merges = [("▁", "s"), ("l", "d"), ("o", "l"), ("o", "ld"), ("s", "old"), ("▁", "sold"), ("▁s", "old")]
    model = models.BPE(
        {t: i for i, t in enumerate(names)}, merges, unk_token=names[3], byte_fallback=True, fuse_unk=True
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")  # type: ignore[assignment]
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<pad>", "<eos>", "<bos>"])
    make_model("gemma2", **GEMMA, vocab_size=len(names)).save_pretrained(tmp_path / "base")
    tokenizer.save(str(tmp_path / "base" / "tokenizer.json"))
    all_ok(export_model(open_model(tmp_path / "base"), "gguf", tmp_path / "m.gguf"))
    with LlamaCpp(tmp_path / "m.gguf") as engine:
        assert engine.tokenize(TEXT) == tokenizer.encode(TEXT).ids


def test_a_tokenizer_without_a_name_is_refused() -> None:
    tokenizer = Tokenizer(models.BPE({"a": 0, "aa": 1}, [("a", "a")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ValueError, match="neither merges bytes nor falls back to them"):
        vocabulary_of(json.loads(tokenizer.to_str()), 4)
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token=chr(97)))
    with pytest.raises(ValueError, match=r"of the kind WordLevel, which llama\.cpp does not know"):
        vocabulary_of(json.loads(words.to_str()), 4)


@torch.no_grad()
def test_llama_3_positions(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }  # fmt: skip
    base = make_base(tmp_path, "llama", **WIDE, rope_parameters=scaling)
    all_ok(export_model(open_model(base), "gguf", tmp_path / "m.gguf"))
    assert types_of(tmp_path / "m.gguf")["rope_freqs.weight"] == "F32"


def test_uneven_blocks_are_as_wide_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Feed-forward lengths block by block, in an array; integers as they were chosen."""
    base = make_base(tmp_path, "llama", **WIDE)
    monkeypatch.setattr("decoct.engine.uneven.global_share", lambda *_: [96, 32, 64])
    rtn = {"linear": {"match": "mlp.*", "rtn": {"bits": 4, "group_size": 32}}}
    stages = [{"flap": {"keep": 0.7, "multiple_of": 32, "uneven": True}}, {"blocks": [rtn]}]
    out = run(base, tmp_path / "out", stages=stages).folder
    all_ok(decoct.export(out, "gguf", tmp_path / "m.gguf"))
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    assert reader.fields["deci.feed_forward_length"].contents() == [96, 32, 64]
    shapes = {tensor.name: [int(n) for n in tensor.shape] for tensor in reader.tensors}
    assert [shapes[f"blk.{i}.ffn_down.weight"] for i in range(3)] == [[96, 64], [32, 64], [64, 64]]
    assert {types_of(tmp_path / "m.gguf")[f"blk.{i}.ffn_up.weight"] for i in range(3)} == {"Q4_0"}


def test_widths_between_are_filled_with_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 32 entries have to be whole, so a width of 44 is written as 64."""
    base = make_base(tmp_path, "llama", **WIDE)
    monkeypatch.setattr("decoct.engine.uneven.global_share", lambda *_: [44, 64, 84])
    rtn = {"linear": {"match": ["mlp.gate", "mlp.up"], "rtn": {"bits": 4, "group_size": 32}}}
    stages = [{"flap": {"keep": 0.7, "multiple_of": 4, "uneven": True}}, {"blocks": [rtn]}]
    out = run(base, tmp_path / "out", stages=stages).folder
    all_ok(decoct.export(out, "gguf", tmp_path / "m.gguf"))
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    assert reader.fields["deci.feed_forward_length"].contents() == [64, 64, 96]


def test_elsewhere_uneven_blocks_are_written_with_their_zeros(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base(tmp_path, "qwen2", **WIDE)
    monkeypatch.setattr("decoct.engine.uneven.global_share", lambda *_: [96, 32, 64])
    rtn = {"linear": {"match": "mlp.*", "rtn": {"bits": 4, "group_size": 32}}}
    stages = [{"flap": {"keep": 0.7, "multiple_of": 32, "uneven": True, "bias": False}}, {"blocks": [rtn]}]
    out = run(base, tmp_path / "out", stages=stages).folder
    all_ok(decoct.export(out, "gguf", tmp_path / "m.gguf"))
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    assert reader.fields["qwen2.feed_forward_length"].contents() == 128

"""Where a result may go, what travels with it, and what is left alone."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from decoct import compress
from decoct.exporters import export_model
from decoct.model import open_model
from decoct.store import FolderSource, read_json, sha256
from tests.engine.running import EVERYTHING, GPTQ, RTN, Crash, crash_at, digests, make_base, run, whole
from tests.engine.test_resume import spy, stop_after


def test_a_file_is_no_folder(base: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    for fresh in (False, True):
        with pytest.raises(ValueError, match="out is a file; choose a folder"):
            run(base, tmp_path / "out", RTN, fresh=fresh)
    assert (tmp_path / "out").read_text() == "mine"


def test_a_folder_that_is_not_ours_is_left_alone(base: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    for fresh in (False, True):
        with pytest.raises(ValueError, match="out is not empty and holds no run of decoct; choose another folder"):
            run(base, tmp_path / "out", RTN, fresh=fresh)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_an_empty_folder_is_fine(base: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert digests(run(base, tmp_path / "out", RTN).folder) == whole(base, RTN)


def test_the_model_itself_is_left_alone(tmp_path: Path) -> None:
    base = make_base(tmp_path)
    before = digests(base)
    (tmp_path / "link").symlink_to(base)
    for out in (base, tmp_path / "link", base / ".." / "base"):
        for fresh in (False, True):
            with pytest.raises(ValueError, match="is the model itself; choose another folder"):
                run(base, out, RTN, fresh=fresh)
    assert digests(base) == before


def test_a_finished_result_is_replaced_only_with_fresh(base: Path, tmp_path: Path) -> None:
    before = digests(run(base, tmp_path / "out", RTN).folder)
    with pytest.raises(ValueError, match="already holds a finished model; choose another folder, or add --fresh"):
        run(base, tmp_path / "out", GPTQ)
    assert digests(tmp_path / "out") == before
    assert digests(run(base, tmp_path / "out", GPTQ, fresh=True).folder) == whole(base, GPTQ)


def test_fresh_keeps_the_old_result_when_the_new_run_is_refused(base: Path, tmp_path: Path) -> None:
    before = digests(run(base, tmp_path / "out", RTN).folder)
    with pytest.raises(ValueError, match="group_size 7 does not divide"):
        run(base, tmp_path / "out", {"linear": {"gptq": {"group_size": 7}}}, fresh=True)
    assert digests(tmp_path / "out") == before


def test_fresh_does_not_remove_the_model_it_reads(base: Path, tmp_path: Path) -> None:
    """Exports are written into the result's folder, so a model inside the output folder is nothing odd."""
    out = run(base, tmp_path / "out", RTN).folder
    shutil.copytree(base, out / "dense")
    with pytest.raises(ValueError, match=r"model"):
        run(out / "dense", out, GPTQ, fresh=True, data={"source": str(base.parent / "text.txt")})
    assert open_model(out / "dense").num_blocks == 3


def test_fresh_after_a_run_of_another_model(base: Path, tmp_path: Path) -> None:
    """No file of the first run is left, wherever it stopped."""
    larger = make_base(tmp_path, num_hidden_layers=4)
    (tmp_path / "out").mkdir()
    for part in (1, 5):
        with pytest.raises(Crash):
            run(larger, tmp_path / "out", GPTQ, watch=stop_after(part))
        assert digests(run(base, tmp_path / "out", GPTQ, fresh=True).folder) == whole(base, GPTQ)
        shutil.rmtree(tmp_path / "out")


def test_what_travels_with_the_weights(tmp_path: Path) -> None:
    base = make_base(tmp_path)
    extras = {
        "generation_config.json": '{"temperature": 0.7}',
        "special_tokens_map.json": "{}",
        "chat_template.jinja": "{{ messages }}",
        "tokenizer.model": "spm",
        "merges.txt": "a b",
    }
    strangers = {"README.md": "card", "pytorch_model.bin": "old", "training_args.bin": "x", "decoct-run.json": "{}"}
    for name, text in {**extras, **strangers}.items():
        (base / name).write_text(text)
    (base / "onnx").mkdir()
    (base / "model.safetensors.index.json.bak").write_text("{}")
    out = run(base, tmp_path / "out", RTN).folder
    assert {name: (out / name).read_text() for name in extras} == extras
    assert (out / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    names = {path.name for path in out.iterdir()}
    assert not names & {"README.md", "pytorch_model.bin", "training_args.bin", "onnx"}
    assert read_json(out / "decoct-run.json")["stages"], "the run's own summary, not the model's"


def test_config_index_and_manifest(base: Path, tmp_path: Path) -> None:
    out = run(base, tmp_path / "out", EVERYTHING).folder
    ours, theirs = read_json(out / "config.json"), read_json(base / "config.json")
    assert ours.pop("quantization_config") == {"quant_method": "decoct", "format_version": 1}
    assert ours == theirs
    manifest = read_json(out / "decoct.json")
    shards = sorted(path.name for path in out.glob("*.safetensors"))
    assert manifest["shards"] == {name: sha256(out / name) for name in shards}
    index = read_json(out / "model.safetensors.index.json")
    assert sorted(set(index["weight_map"].values())) == shards
    model = open_model(out)
    assert index["metadata"]["total_size"] == model.nbytes
    assert isinstance(model.source, FolderSource)
    assert set(index["weight_map"]) == set(model.source.names())
    entry = manifest["lineage"][0]
    assert entry["source"]["label"] == "base"
    assert entry["data"]["source"] == "text.txt"
    assert json.dumps(str(tmp_path)) not in json.dumps(manifest), "no path of this machine"
    assert oct((out / shards[0]).stat().st_mode & 0o777) == oct((out / "config.json").stat().st_mode & 0o777)


def test_a_model_that_stays_dense_is_no_quantized_one(base: Path, tmp_path: Path) -> None:
    """Nothing in its config keeps other engines from loading it."""
    out = run(base, tmp_path / "out", {"linear": [{"match": "attn.q", "leave": True}]}).folder
    assert "quantization_config" not in read_json(out / "config.json")
    for name in open_model(base).slots():
        assert torch.equal(open_model(out).weight(name).unpack(), open_model(base).weight(name).unpack())


def test_a_result_is_compressed_further(base: Path, tmp_path: Path) -> None:
    first = run(base, tmp_path / "first", RTN).folder
    second = run(first, tmp_path / "second", {"linear": {"match": "embed", "rtn": {"bits": 8, "group_size": 8}}}).folder
    one, two = open_model(first), open_model(second)
    assert len(two.lineage) == 2
    assert two.nbytes < one.nbytes
    for name in one.slots():
        if name != "model.embed_tokens.weight":
            assert torch.equal(one.weight(name).unpack(), two.weight(name).unpack())
    with pytest.raises(ValueError, match=r"gptq cannot be applied to a GroupInt weight"):
        run(first, tmp_path / "third", GPTQ, data={"source": str(base.parent / "text.txt")})


def test_exports_lie_beside_the_result(base: Path, tmp_path: Path) -> None:
    recipe = {"stages": [{"blocks": [RTN]}], "export": "dense"}
    out = compress(base, recipe, tmp_path / "out").folder
    assert open_model(out / "dense").described == {}
    assert open_model(out).described


def test_an_interrupted_export_is_made_up_for(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same command goes on, wherever it was stopped."""
    recipe = {"stages": [{"blocks": [RTN]}], "export": "dense"}
    monkeypatch.setattr("decoct.api.export_model", crash_at(0, export_model))
    with pytest.raises(Crash):
        compress(base, recipe, tmp_path / "out")
    monkeypatch.setattr("decoct.api.export_model", export_model)
    out = compress(base, recipe, tmp_path / "out").folder
    assert open_model(out / "dense").described == {}
    written = spy(monkeypatch)
    assert compress(base, recipe, tmp_path / "out").folder == out
    assert not written


def test_a_half_removed_run_folder_is_no_unfinished_run(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped while it cleaned up: everything is there, and hours of work are not done again."""
    before = digests(run(base, tmp_path / "out", GPTQ).folder)
    (tmp_path / "out" / ".run").mkdir()
    (tmp_path / "out" / ".run" / "lock").touch()
    written = spy(monkeypatch)
    run(base, tmp_path / "out", GPTQ)
    assert not written
    assert {name: digest for name, digest in digests(tmp_path / "out").items() if ".run" not in name} == before


def test_fresh_keeps_the_old_result_when_the_text_is_too_short(base: Path, tmp_path: Path) -> None:
    before = digests(run(base, tmp_path / "out", GPTQ).folder)
    (tmp_path / "short.txt").write_text("Ten tokens")
    with pytest.raises(ValueError, match=r"short\.txt has \d+ tokens"):
        run(base, tmp_path / "out", GPTQ, fresh=True, data={"source": str(tmp_path / "short.txt")})
    assert digests(tmp_path / "out") == before


def test_what_is_refused_leaves_nothing(base: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Ten tokens")
    (tmp_path / "there").mkdir()
    for out in (tmp_path / "new", tmp_path / "there"):
        with pytest.raises(ValueError, match="tokens"):
            run(base, out, GPTQ, data={"source": str(tmp_path / "short.txt")})
    assert not (tmp_path / "new").exists()


def test_another_text_of_the_same_name_is_another_command(base: Path, tmp_path: Path) -> None:
    copy, other = tmp_path / "a" / "text.txt", tmp_path / "b" / "text.txt"
    for path in (copy, other):
        path.parent.mkdir()
    shutil.copy(base.parent / "text.txt", copy)
    other.write_text((base.parent / "text.txt").read_text()[::-1])
    before = digests(run(base, tmp_path / "out", GPTQ).folder)
    assert digests(run(base, tmp_path / "out", GPTQ, data={"source": str(copy)}).folder) == before
    with pytest.raises(ValueError, match="already holds a finished model"):
        run(base, tmp_path / "out", GPTQ, data={"source": str(other)})
    assert digests(tmp_path / "out") == before


def test_a_damaged_result_is_called_so(base: Path, tmp_path: Path) -> None:
    out = run(base, tmp_path / "out", RTN).folder
    next(out.glob("model-00002*")).unlink()
    with pytest.raises(ValueError, match=r"holds this command's result, damaged \(.*does not exist.*add --fresh"):
        run(base, out, RTN)
    assert digests(run(base, out, RTN, fresh=True).folder) == whole(base, RTN)

"""Who teaches, and what is read: several teachers, a cached one, another tokenizer, prompts with answers."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from decoct.engine.data import Data, load_tokenizer
from decoct.model import open_model
from decoct.recipe import RecipeError, build_method
from decoct.training.lessons import Lessons
from decoct.training.text import read_text
from tests.engine.running import RTN, make_base, run
from tests.tiny import make_model


def trained(base: Path, out: Path, **settings: Any) -> Path:
    """A rounded model, then training; gives the result's folder."""
    settings = {"num_steps": 4, "batch_size": 2, "sequence_length": 16, "learning_rate": 0.02, **settings}
    return run(base, out, stages=[{"blocks": [RTN]}, {"distill": settings}]).folder


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another teacher with the same tokenizer."""
    folder = make_base(tmp_path_factory.mktemp("other"))
    model = make_model("llama-tied")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.7)
    model.save_pretrained(folder)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    model = open_model(folder)
    return {name: model.weight(name).unpack() for name in model.slots()}


def differ(one: Path, two: Path) -> bool:
    a, b = weights(one), weights(two)
    return any(not torch.equal(a[name], b[name]) for name in a)


def test_several_teachers_teach_together(base: Path, other: Path, tmp_path: Path) -> None:
    folders = {}
    for name, settings in {
        "one": {"teacher": str(base)},
        "both": {"teacher": [str(base), str(other)]},
        "mostly one": {"teacher": [str(base), str(other)], "teacher_weights": [1e6, 1e-6]},
        "surest": {"teacher": [str(base), str(other)], "teachers": "surest"},
    }.items():
        folders[name] = trained(base, tmp_path / name, **settings)
    assert differ(folders["one"], folders["both"])
    assert differ(folders["both"], folders["surest"])
    for name, matrix in weights(folders["one"]).items():
        torch.testing.assert_close(weights(folders["mostly one"])[name], matrix, atol=2e-3, rtol=0)


def test_a_teacher_that_is_kept_on_disk_teaches_alike(base: Path, tmp_path: Path) -> None:
    direct = trained(base, tmp_path / "direct")
    kept = trained(base, tmp_path / "kept", keep_teacher=95, loss="cached_kl")
    for name, matrix in weights(direct).items():
        torch.testing.assert_close(weights(kept)[name], matrix, atol=2e-3, rtol=0)
    some = trained(base, tmp_path / "some", keep_teacher=8, loss="cached_kl")
    assert differ(direct, some)


@pytest.mark.parametrize("settings", [{"keep_teacher": 8}, {"loss": "cached_kl"}])
def test_a_kept_teacher_and_its_loss_need_each_other(settings: dict[str, Any], base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="need each other"):
        trained(base, tmp_path, **settings)


def test_wrong_settings_are_refused() -> None:
    for settings, words in (
        ({"teacher_weights": [1.0]}, None),
        ({"teacher": ["a", "b"], "teacher_weights": [1.0]}, "2 positive numbers"),
        ({"teacher": ["a"], "teacher_weights": [-1.0]}, "1 positive numbers"),
        ({"keep_teacher": -1}, "must not be negative"),
        ({"teachers": "best"}, "teachers"),
    ):
        if words is None:
            build_method("distill", settings, "stage")
            continue
        with pytest.raises((RecipeError, ValueError), match=words):
            build_method("distill", settings, "stage")


def test_a_teacher_with_another_tokenizer(base: Path, tmp_path: Path) -> None:
    """Its tokens are characters too, by other numbers."""
    folder = tmp_path / "teacher"
    make_model("llama").save_pretrained(folder)
    characters = Tokenizer(models.WordLevel({chr(c): c - 32 for c in range(32, 127)}, unk_token=" "))  # noqa: S106 - no password
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    characters.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=characters).save_pretrained(folder)
    with pytest.raises(ValueError, match="set loss=uld"):
        trained(base, tmp_path / "a", teacher=str(folder))
    own, both = (
        trained(base, tmp_path / name, teacher=str(folder), loss={"uld": {"weight": weight}})
        for name, weight in (("own", 1e-9), ("both", 2.0))
    )
    assert differ(own, both), "the teacher has a say"


def test_prompts_are_read_and_not_taught(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "asked.jsonl"
    tokenizer = load_tokenizer(open_model(base))
    word = tokenizer.decode([7])
    rows = [{"prompt": word, "response": word, "weight": weight} for weight in (1.0, 3.0, 1.0, 1.0)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    method = build_method(
        "distill", {"data": str(path), "sequence_length": 16, "num_steps": 2, "batch_size": 3}, "stage"
    )
    text = read_text(method, Data(), open_model(base), None, print)
    assert text.counts is not None
    assert len(text.train) == 4
    tokens, batch = text.batch(0, 3)
    assert 0 < int((batch.weights > 0).sum()) < tokens.numel() - 3
    assert float(batch.weights.sum()) == pytest.approx(1.0)
    assert sorted(set(text.counts[text.counts > 0].tolist())) == [1.0, 3.0]
    assert trained(base, tmp_path / "out", data=str(path), loss="cross_entropy").exists()
    (prompts, what) = text.batch(0, 3)
    student = SimpleNamespace(model=open_model(base))
    found = Lessons.of(method, text, student)._prompts(prompts, what)  # type: ignore[arg-type]
    assert found == [tokens[0, :3].tolist()] * 3, "BOS, the prompt's letter, the line's end"
    assert trained(base, tmp_path / "own", data=str(path), on_policy=1.0, num_steps=1).exists()

"""Low-rank terms, texts that students write, and students made of their teacher's blocks."""

from pathlib import Path
from typing import Any

import pytest
import torch

import decoct
from decoct.methods.prune.distilbert import DistilBERT
from decoct.model import open_model
from decoct.samples import Mixer, Source
from decoct.training.views.adapter import ZeroPointLeaf, with_lora
from decoct.training.views.view import View
from decoct.weights import Dense, GroupInt
from tests.engine.running import GPTQ, RTN, Crash, Settings, digests, make_base, run
from tests.training.test_distill import stop_after
from tests.weights.samples import group_int, samples

SHORT: Settings = {"num_steps": 4, "batch_size": 2, "sequence_length": 16}


@pytest.mark.parametrize("name", ["masked", "sum"])
def test_a_term_beside_any_weight(name: str) -> None:
    weight = next(each for key, each in samples().items() if name in key)
    corrected, inside = with_lora(weight, 2, 0, "x")
    view = View(corrected, chosen=lambda name: name.startswith(inside))
    before = weight.unpack(torch.float32)
    torch.testing.assert_close(view(torch.float32).detach(), before, rtol=1e-2, atol=1e-2)
    gradient = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    (view(torch.float32) * gradient).sum().backward()
    left, right = (parameter for parameter, _ in view.units())
    assert left.grad is not None
    torch.testing.assert_close(left.grad, gradient @ right.detach().T, rtol=1e-2, atol=1e-2)
    with torch.no_grad():
        left += 1.0
    back = view.weight()
    expected = before + torch.ones_like(left) @ right.detach()
    torch.testing.assert_close(back.unpack(torch.float32), expected, rtol=2e-2, atol=2e-2)
    assert len(back.terms) == (len(weight.terms) + 1 if name == "sum" else 2)  # type: ignore[attr-defined]


@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_points_take_a_low_rank_term(symmetric: bool) -> None:
    """The matrix is the quantized one plus scale times the term's entry of each row and group."""
    weight = group_int(symmetric=symmetric)
    leaf = ZeroPointLeaf(weight, 2, 0, "x")
    torch.testing.assert_close(leaf.matrix().detach(), weight.unpack(torch.float32))
    with torch.no_grad():
        leaf.left.normal_(generator=torch.Generator().manual_seed(1))
    made = leaf.weight()
    assert isinstance(made, GroupInt)
    assert torch.equal(made.codes, weight.codes)
    assert torch.equal(made.scale, weight.scale)
    torch.testing.assert_close(leaf.matrix().detach(), made.unpack(torch.float32))
    term = (leaf.left @ leaf.right).detach() * weight.scale.float()
    expected = weight.unpack(torch.float32) + term.repeat_interleave(weight.group_size, 1)
    torch.testing.assert_close(made.unpack(torch.float32), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(("train", "kind"), [("lora", "Sum"), ("qa_lora", "GroupInt")])
def test_what_is_rounded_stays(train: str, kind: str, base: Path, tmp_path: Path) -> None:
    stages = [{"blocks": [GPTQ]}, {"distill": {**SHORT, "train": [train], "rank": 2, "learning_rate": 0.05}}]
    before = open_model(run(base, tmp_path / "before", GPTQ).folder)
    data = {"source": str(base.parent / "text.txt"), "num_sequences": 4, "sequence_length": 16}
    planned = decoct.plan(base, {"stages": stages, "data": data})
    made = open_model(run(base, tmp_path / "out", stages=stages).folder)
    assert planned.result is not None
    assert made.described == planned.result.described
    name = "model.layers.1.mlp.up_proj.weight"
    assert made.described[name]["kind"] == kind
    old, new = before.weight(name), made.weight(name)
    codes = {part: tensor for part, tensor in new.tensors().items() if part.endswith("codes")}
    assert [torch.equal(tensor, old.tensors()["codes"]) for tensor in codes.values()] == [True]
    assert not torch.equal(new.unpack(), old.unpack())
    assert torch.equal(made.tensor("model.norm.weight"), before.tensor("model.norm.weight"))


def test_the_student_writes(base: Path, tmp_path: Path) -> None:
    """Every step, some, or none; the same again each time; MiniLLM asks for all of them."""
    found = {}
    for share in (0.0, 0.5, 1.0):
        stages = [{"blocks": [GPTQ]}, {"distill": {**SHORT, "on_policy": share}}]
        found[share] = run(base, tmp_path / f"{share}", stages=stages).losses
    assert len(set(found.values())) == 3
    assert found[0.5][0] in (found[0.0][0], found[1.0][0])
    again = [{"blocks": [GPTQ]}, {"distill": {**SHORT, "on_policy": 1.0}}]
    assert run(base, tmp_path / "again", stages=again).losses == found[1.0]
    with pytest.raises(ValueError, match=r"minillm learns from texts that the student writes alone; set on_policy"):
        run(base, tmp_path / "no", stages=[{"distill": {**SHORT, "loss": "minillm"}}])
    alone = {**SHORT, "loss": {"minillm": {"teacher_share": 0.0}}, "on_policy": 1.0}
    assert len(run(base, tmp_path / "minillm", stages=[{"blocks": [RTN]}, {"distill": alone}]).losses) == 4


def test_the_share_of_own_texts_adapts(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DistiLLM: it rises as held-out text gets worse, own texts are read again; stopped, it goes on."""
    settings = {
        **SHORT, "num_steps": 10, "replay": 4, "on_policy": 0.5, "evaluate_every": 1, "held_out": 2,
        "learning_rate": 0.9, "warmup": 0.0, "schedule": "constant", "loss": {"forward_kl": {"weight": 10.0}},
    }  # fmt: skip
    recipe: Settings = {"stages": [{"blocks": [RTN]}, {"distill": settings}]}
    sources, shares = [], []
    choose = Mixer.choose

    def noted(self: Mixer, step: int, total: int) -> Source:
        sources.append(choose(self, step, total))
        shares.append(self.share)
        return sources[-1]

    monkeypatch.setattr(Mixer, "choose", noted)
    run(base, tmp_path / "whole", **recipe)
    assert shares[-1] > shares[0] == 0.5
    assert set(sources) == {Source.TEXTS, Source.FRESH, Source.REPLAY}
    monkeypatch.setattr("decoct.training.loop._SAVE_SECONDS", 0.0)
    monkeypatch.setattr("decoct.training.loop._SAVE_SHARE", 0.0)
    with pytest.raises(Crash):
        run(base, tmp_path / "out", watch=stop_after(6), **recipe)
    assert digests(run(base, tmp_path / "out", **recipe).folder) == digests(tmp_path / "whole")


@pytest.mark.parametrize(
    ("blocks", "settings", "kept"),
    [
        (4, {"keep": 0.5}, [0, 3]),
        (5, {"keep": 0.6}, [0, 2, 4]),
        (30, {"num_dropped": 15}, [0, 2, 4, 6, 8, 10, 12, 15, 17, 19, 21, 23, 25, 27, 29]),
        (2, {"num_dropped": 1}, [0]),
    ],
)
def test_every_kth_block(blocks: int, settings: dict[str, Any], kept: list[int]) -> None:
    method = DistilBERT(**settings)
    method.check(blocks)
    gone = {cut.block for cut in method.guess(blocks)}
    left = [block for block in range(blocks) if block not in gone]
    assert len(left) == len(kept)
    assert left == pytest.approx(kept, abs=1)
    assert left[0] == kept[0]


def test_a_student_of_half_the_depth(tmp_path: Path) -> None:
    base = make_base(tmp_path, num_hidden_layers=4)
    settings = [
        "distill.num_steps=3", "distill.held_out=2", "distill.batch_size=2", "data.num_sequences=4",
        "data.sequence_length=16", f"data.source={tmp_path / 'text.txt'}",
    ]  # fmt: skip
    result = decoct.compress(base, "student-half", tmp_path / "out", settings=settings)
    made = open_model(result.folder)
    assert made.num_blocks == 2
    assert not made.described
    assert isinstance(made.weight("model.layers.1.mlp.up_proj.weight"), Dense)
    assert len(result.losses) == 3

"""Learned rotations: right gradients, a smaller loss, the same predictions, and runs that go on alike."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import decoct.engine.learn_basis as learn
from decoct.engine.compress import compress_job
from decoct.engine.job import Watch
from decoct.engine.learn_basis import ROTATIONS, Learning, learned_basis
from decoct.engine.rotate import Basis, RotatedModel, rotated
from decoct.engine.stages import plan_stages
from decoct.methods import METHODS
from decoct.methods.rotate.spinquant import SpinQuant
from decoct.model import open_model
from decoct.ops.rotation import Turn
from tests.engine.running import GPTQ, digests, make_base, make_job, run
from tests.engine.test_rotate import predictions, some_tokens
from tests.tiny import save_model

SPINQUANT: dict[str, Any] = {"spinquant": {"num_steps": 4, "batch_size": 2, "bits": 4}}


def begin(folder: Path, name: str, dtype: torch.dtype = torch.float32, **settings: Any) -> Learning:
    save_model(name, folder / "base", dtype)
    method = METHODS["spinquant"](**settings)
    model = rotated(open_model(folder / "base"), [method])
    assert isinstance(model, RotatedModel)
    assert isinstance(method, SpinQuant)
    return Learning(method, model, some_tokens(), dtype, folder, lambda _: None)


def smooth(x: torch.Tensor, *_: Any) -> torch.Tensor:
    """Changes entries one by one, as rounding does, but has a derivative."""
    return x + 0.3 * x.square() * torch.tanh(x)


def skewed(n: int, seed: int) -> torch.Tensor:
    drawn = torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    skew = drawn - drawn.T
    return skew / skew.norm()


def further(basis: Basis, direction: list[torch.Tensor], size: float) -> Basis:
    """Every rotation turned by exp(size·direction)."""
    turns = [basis.residual, *basis.values]
    moved = [
        None if turn is None or turn.matrix is None else Turn(matrix=torch.matrix_exp(size * s) @ turn.matrix)
        for turn, s in zip(turns, direction, strict=True)
    ]
    return Basis(moved[0], tuple(turn for turn in moved[1:] if turn is not None))


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2", "qwen3"])
def test_gradients_are_those_of_finite_differences(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learn, "rounded_tokens", smooth)
    monkeypatch.setattr(learn, "LOGITS_AT_ONCE", 96 * 5)  # the head in pieces
    learner, size = learn._Learner(begin(tmp_path, name, torch.float64, online=False)), 1e-2
    start = learner.model.basis
    direction = [skewed(32, 1), *(skewed(8, 2 + block) for block in range(3))]
    with torch.no_grad():
        _, torque = learner.torque(some_tokens())
        for part, gradient in enumerate([torque.residual, *torque.values]):
            alone = [s if number == part else torch.zeros_like(s) for number, s in enumerate(direction)]
            losses = []
            for sign in (-1, 1):
                learner._use(further(start, alone, sign * size))
                losses.append(learner.torque(some_tokens())[0])
            expected = (losses[1] - losses[0]) / (2 * size)
            assert abs(expected) > 3e-4
            assert float((gradient.double() * direction[part]).sum()) == pytest.approx(expected, rel=3e-3, abs=3e-5)


def test_the_loss_falls_and_rotations_stay_orthogonal(tmp_path: Path) -> None:
    losses: list[float] = []
    todo = begin(tmp_path, "llama", num_steps=30, batch_size=2, bits=3, learning_rate=1.5)
    basis = learned_basis(replace(todo, on_event=lambda event: losses.append(event.loss or 0.0)))
    assert sum(losses[-5:]) / 5 < losses[0] - 0.02
    for turn in (basis.residual, *basis.values):
        assert turn is not None
        torch.testing.assert_close(turn.dense() @ turn.dense().T, torch.eye(len(turn), dtype=torch.float64))
    assert basis.residual is not None
    assert not torch.allclose(basis.residual.dense(), Turn.random(32, 0).dense(), atol=1e-2)


@torch.no_grad()
def test_the_result_predicts_what_the_model_did(tmp_path: Path) -> None:
    base = make_base(tmp_path, "llama-tied")
    made = open_model(run(base, tmp_path / "out", SPINQUANT).folder)
    assert not made.tied
    torch.testing.assert_close(
        predictions(made, some_tokens()), predictions(open_model(base), some_tokens()), rtol=1e-3, atol=1e-4
    )


def test_quantizers_follow_and_sizes_are_known(tmp_path: Path) -> None:
    base = make_base(tmp_path, "llama-tied")
    job = make_job(base, tmp_path / "out", SPINQUANT, GPTQ)
    plan = plan_stages(job.model, job.stages, job.data, job.budget, None)
    result = compress_job(job, Watch())
    assert plan.needs_data
    assert plan.output_bytes == pytest.approx(result.nbytes, rel=0.02)
    assert len(result.losses) == 4
    assert set(result.errors) == {"block 0", "block 1", "block 2"}


@pytest.mark.parametrize("part", ["step 2", "step 4", "block 1"])
def test_a_run_that_was_stopped_goes_on_alike(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learn, "_SAVE_SECONDS", 0.0)
    base = make_base(tmp_path)
    whole = digests(run(base, tmp_path / "whole", SPINQUANT, GPTQ).folder)

    class StopError(Exception):
        pass

    def stop(event: Any) -> None:
        if event.part == part:
            raise StopError

    with pytest.raises(StopError):
        compress_job(make_job(base, tmp_path / "again", SPINQUANT, GPTQ), Watch(event=stop))
    (saved,) = (tmp_path / "again").rglob(ROTATIONS)
    assert saved.stat().st_size > 8 * 32**2
    seconds = []
    compress_job(
        make_job(base, tmp_path / "again", SPINQUANT, GPTQ),
        Watch(event=lambda event: seconds.append(event.seconds) if event.loss is not None else None),
    )
    assert seconds[:2] == [0.0, 0.0]  # not learned again
    assert digests(tmp_path / "again") == whole


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("mixtral", {}, "mixture of experts; use quarot"),
        ("gpt2", {"values": False}, "models with RMSNorm; use quarot"),
        ("gemma2", {}, "norms after each sublayer"),
        ("llama", {"residual": False, "values": False}, "nothing would be learned; use quarot"),
        ("llama", {"bits": 9}, "bits must be 2 to 8"),
        ("llama", {"clip_ratio": 0.0}, "clip_ratio must lie between"),
        ("llama", {"num_steps": 0}, "at least 1"),
    ],
)
def test_what_cannot_be_learned_is_refused(name: str, settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    base = make_base(tmp_path, name)
    with pytest.raises(ValueError, match=message):
        run(base, tmp_path / "out", {"spinquant": settings})


def test_more_memory_than_the_budget_is_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path)
    with pytest.raises(ValueError, match=r"budget allows"):
        run(base, tmp_path / "out", {"spinquant": {"batch_size": 2000000}}, budget={"host": "1GiB"})

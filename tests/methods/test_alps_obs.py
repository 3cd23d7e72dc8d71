"""ALPS and optimal brain surgeon against their definitions in float64, and against each other's and simpler losses."""

from itertools import pairwise
from typing import Any

import pytest
import torch

from decoct.methods.prune.alps import ALPS, scaled_hessian
from decoct.methods.prune.magnitude import Magnitude
from decoct.methods.prune.obs import OBS
from decoct.methods.prune.sparsegpt import SparseGPT
from decoct.methods.prune.wanda import Wanda
from decoct.methods.pruning import Pruning
from decoct.ops.admm import refit, sparse_support
from decoct.ops.sparsity import Pattern
from decoct.ops.surgeon import surgeon
from decoct.stats import ColumnNorm, Gram
from decoct.weights import Dense, Sparse
from tests.reference import pruning as reference
from tests.reference.inputs import correlated, gaussian, hessian, output_error

OUT, IN = 10, 24
PATTERNS = [Pattern(12, IN), Pattern(OUT * IN * 7 // 10, OUT * IN), Pattern(2, 4), Pattern(5, 6)]


def setting(out: int = OUT, width: int = IN) -> tuple[torch.Tensor, torch.Tensor, Gram]:
    x = correlated(4 * width, width)
    stat = Gram.empty(width)
    stat.add(x)
    return gaussian(out, width, seed=7), x, stat


def damped(H: torch.Tensor, damping: float = 0.01) -> torch.Tensor:
    return H + damping * torch.diagonal(H).mean() * torch.eye(H.shape[0], dtype=H.dtype)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_the_surgeon_removes_what_costs_least_and_solves_for_the_rest(pattern: Pattern, masked: bool) -> None:
    w, x, stat = setting()
    kept = torch.rand(OUT, IN, generator=torch.Generator().manual_seed(2)) < 0.8 if masked else None
    w = w if kept is None else w * kept
    found, survivors = surgeon(w, stat.matrix(), pattern, kept=kept)
    H = damped(hessian(x))
    expected = reference.surgeon(w, H, pattern.num_dropped, pattern.run, None if kept is None else kept.tolist())
    assert survivors.tolist() == expected
    torch.testing.assert_close(found.double(), reference.least_squares(w, H, expected), rtol=1e-4, atol=1e-4)


def test_small_inputs_among_dead_ones_are_treated_as_large_ones() -> None:
    """Dead features must not weigh in the mean that damping is a fraction of."""
    w, x, _ = setting()
    x[:, ::2] = 0
    (values, alive), (small, same) = (surgeon(w, hessian(factor * x), Pattern(18, IN)) for factor in (1.0, 0.01))
    assert torch.equal(alive, same)
    torch.testing.assert_close(values, small, rtol=1e-4, atol=1e-5)


def test_the_surgeons_own_updates_come_to_least_squares() -> None:
    """Hassibi and Stork's update for every removal, on one row."""
    w, x, stat = setting(1)
    H = damped(hessian(x))
    inverse, v = torch.linalg.inv(H), w[0].double()
    gone = torch.zeros(IN, dtype=torch.bool)
    for _ in range(12):
        cost = v.square() / torch.diagonal(inverse)
        p = int(cost.masked_fill(gone, torch.inf).argmin())
        gone[p] = True
        v = v - v[p] / inverse[p, p] * inverse[p]
        inverse = inverse - torch.outer(inverse[p], inverse[p]) / inverse[p, p]
        inverse[p, p] = 1.0
        v = v * ~gone
    found, _ = surgeon(w, stat.matrix(), Pattern(12, IN))
    torch.testing.assert_close(found[0].double(), v, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rho", [0.1, 1e3])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_splitting_is_the_papers_iteration(pattern: Pattern, rho: float) -> None:
    w, _, stat = setting()
    H, size = scaled_hessian(stat.matrix(), 0.01)
    found, survivors = sparse_support(w * size, H, pattern.survivors, rho=rho)
    expected = reference.splitting((w * size).T.double(), H.double(), pattern.num_dropped, pattern.run, rho).T
    assert int((survivors != (expected != 0)).sum()) <= 2, "float32 may decide a near tie otherwise"
    agreeing = (survivors == (expected != 0)).all(1)
    assert int(agreeing.sum()) >= OUT - 2
    loss = [output_error((values - w * size).float(), torch.linalg.cholesky(H).T) for values in (found, expected)]
    assert loss[0] == pytest.approx(loss[1], rel=0.02)


def test_conjugate_gradients_end_at_least_squares_and_never_rise() -> None:
    w, _, stat = setting()
    H, size = scaled_hessian(stat.matrix(), 0.01)
    target, survivors = w * size, Pattern(12, IN).survivors(w.abs())
    exact = reference.least_squares(target, H.double(), survivors.tolist())
    losses = []
    for steps in (0, 1, 2, 5, 10, 40):
        found = refit(target, H, target * survivors, survivors, steps)
        assert not found[~survivors].any()
        D = (found - target).double()
        losses.append(float((D @ H.double() @ D.T).trace()))
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(losses))
    torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=1e-3)


def losses(w: torch.Tensor, x: torch.Tensor, settings: dict[str, Any]) -> dict[str, float]:
    classes: list[type[Pruning]] = [Magnitude, Wanda, SparseGPT, ALPS]
    found = {}
    for cls in classes:
        method = cls(**settings)
        stat = None
        if method.stat is not None:
            stat = method.stat.empty(x.shape[1])
            stat.add(x)
        found[cls.__name__] = output_error(method.compress(Dense.of(w), stat).unpack() - w, x)
    return found


@pytest.mark.parametrize("settings", [{"sparsity": 0.5}, {"sparsity": 0.7}, {"n": 2, "m": 4}], ids=str)
def test_whoever_looks_at_more_loses_less(settings: dict[str, Any]) -> None:
    w, x, _ = setting(48, 96)
    found = losses(w, x, settings)
    assert found["ALPS"] < 0.5 * found["SparseGPT"]
    assert found["SparseGPT"] < 0.9 * found["Wanda"]
    assert found["Wanda"] < 0.9 * found["Magnitude"]


def test_at_high_sparsity_splitting_beats_one_at_a_time_removal() -> None:
    w, x, stat = setting(24, 64)
    by_steps, at_once = (cls(sparsity=0.9).compress(Dense.of(w), stat).unpack() for cls in (OBS, ALPS))
    assert output_error(at_once - w, x) < output_error(by_steps - w, x)


@pytest.mark.parametrize("cls", [ALPS, OBS])
def test_with_white_inputs_there_is_nothing_to_make_up_for(cls: type[Pruning]) -> None:
    w = gaussian(OUT, IN)
    found = cls(damping=1e-6).compress(Dense.of(w), Gram.neutral(IN))
    assert isinstance(found, Sparse)
    expected = Magnitude(scope="layer").compress(Dense.of(w))
    assert isinstance(expected, Sparse)
    assert torch.equal(found.survivors(), expected.survivors())
    torch.testing.assert_close(found.unpack(), expected.unpack(), rtol=1e-4, atol=1e-5)


def test_long_rows_are_refused_while_planning() -> None:
    OBS().check((4096, 1024))
    with pytest.raises(ValueError, match="obs takes too long for 2048 input features, 1024 at most; use sparsegpt or"):
        OBS().check((8, 2048))


@pytest.mark.parametrize(
    ("cls", "wrong"),
    [
        (ALPS, {"damping": 0}),
        (ALPS, {"rho": 0}),
        (ALPS, {"num_steps": 0}),
        (ALPS, {"refit_steps": -1}),
        (OBS, {"damping": 2}),
    ],
)
def test_impossible_settings_are_refused(cls: type[Pruning], wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        cls(**wrong)


def test_values_too_large_for_the_dtype_are_refused() -> None:
    w, x, stat = setting()
    big = (w / w.abs().max() * 65000).half()
    with pytest.raises(ValueError, match=r"too large for torch\.float16; use wanda here"):
        OBS(sparsity=0.9).compress(Dense.of(big), stat)
    norm = ColumnNorm.empty(IN)
    norm.add(x)
    Wanda(sparsity=0.9).compress(Dense.of(big), norm)

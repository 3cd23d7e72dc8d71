"""Pruning methods against their definitions, and what all of them owe: exact sparsity, patterns, earlier steps kept."""

from typing import Any

import pytest
import torch

from decoct.methods.prune.alps import ALPS
from decoct.methods.prune.magnitude import Magnitude
from decoct.methods.prune.obd import OBD
from decoct.methods.prune.obs import OBS
from decoct.methods.prune.ria import RIA
from decoct.methods.prune.sparsegpt import SparseGPT
from decoct.methods.prune.wanda import Wanda
from decoct.methods.pruning import Pruning
from decoct.methods.quantize.rtn import RTN
from decoct.weights import Dense, GroupInt, Masked, Sparse, Weight
from tests.reference import pruning as reference
from tests.reference.inputs import correlated, gaussian, hessian
from tests.reference.wanda import norms

OUT, IN, TOKENS = 12, 32, 120
SCORING: list[type[Pruning]] = [Magnitude, Wanda, RIA, OBD]
EVERY: list[type[Pruning]] = [*SCORING, OBS, SparseGPT, ALPS]
SETTINGS: list[dict[str, Any]] = [
    {"sparsity": 0.5, "scope": "row"},
    {"sparsity": 0.7, "scope": "layer"},
    {"sparsity": 0.13, "scope": "layer"},
    {"n": 2, "m": 4},
    {"n": 1, "m": 8},
]


def pruned(method: Pruning, weight: Weight, x: torch.Tensor) -> Weight:
    stat = None
    if method.stat is not None:
        stat = method.stat.empty(x.shape[1])
        stat.add(x)
    return method.compress(weight, stat)


def mask_of(weight: Weight) -> torch.Tensor:
    assert isinstance(weight, Sparse | Masked)
    return weight.survivors()


def runs(method: Pruning, out: int = OUT, cols: int = IN) -> tuple[int, int]:
    """How many drop of how many, from the settings' meaning."""
    if method.n is not None and method.m is not None:
        return method.m - method.n, method.m
    run = cols if method.scope == "row" else out * cols
    return round(method.sparsity * run), run


def score(method: Pruning, w: torch.Tensor, x: torch.Tensor) -> list[list[float]]:
    match method:
        case Magnitude():
            return reference.magnitude(w.tolist())
        case Wanda():
            size = norms(x.tolist())
            return [[abs(v) * size[j] for j, v in enumerate(row)] for row in w.tolist()]
        case RIA():
            return reference.relative_importance(w.tolist(), x.tolist(), method.power)
        case OBD():
            return reference.saliency(w.tolist(), hessian(x).tolist())
    raise AssertionError(method)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("cls", SCORING, ids=lambda cls: cls.__name__)
def test_what_survives_is_the_references(cls: type[Pruning], settings: dict[str, Any]) -> None:
    method, w, x = cls(**settings), gaussian(OUT, IN), correlated(TOKENS, IN)
    found = pruned(method, Dense.of(w), x)
    expected = torch.tensor(reference.lowest_drop(score(method, w, x), *runs(method)))
    assert torch.equal(mask_of(found), expected)
    assert torch.equal(found.unpack(), w * expected)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("cls", EVERY, ids=lambda cls: cls.__name__)
def test_sparsity_is_exact_and_dead_columns_go_first(cls: type[Pruning], settings: dict[str, Any]) -> None:
    method, w, x = cls(**settings), gaussian(OUT, IN), correlated(TOKENS, IN)
    x[:, [3, 4, 17]] = 0
    found = pruned(method, Dense.of(w), x)
    dropped, run = runs(method)
    alive = mask_of(found)
    assert (alive.reshape(-1, run).sum(1) == run - dropped).all()
    assert bool(torch.isfinite(found.unpack()).all())
    if cls is not Magnitude and dropped / run >= 3 / IN:
        assert not alive[:, [3, 4, 17]].any()


@pytest.mark.parametrize("second", [*SETTINGS, {"sparsity": 0.2, "scope": "row"}], ids=str)
@pytest.mark.parametrize("cls", EVERY, ids=lambda cls: cls.__name__)
def test_a_pruned_weight_pruned_further_only_loses_entries(cls: type[Pruning], second: dict[str, Any]) -> None:
    w, x = gaussian(OUT, IN), correlated(TOKENS, IN)
    x[:, 5] = 0
    half = pruned(Wanda(sparsity=0.4), Dense.of(w), x)
    before = mask_of(half)
    for weight in (half, Masked.of(Dense.of(half.unpack()), before)):
        method = cls(**second)
        after = pruned(method, weight, x)
        assert type(after) is type(weight)
        alive = mask_of(after)
        assert not (alive & ~before).any()
        assert not after.unpack()[~alive].any()
        dropped, run = runs(method)
        left = torch.minimum(before.reshape(-1, run).sum(1), torch.tensor(run - dropped))
        assert torch.equal(alive.reshape(-1, run).sum(1), left)


@pytest.mark.parametrize("settings", [{}, {"n": 2, "m": 4}], ids=str)
@pytest.mark.parametrize("cls", SCORING, ids=lambda cls: cls.__name__)
def test_codes_stay_what_they_are_where_weights_survive(cls: type[Pruning], settings: dict[str, Any]) -> None:
    w, x = gaussian(OUT, IN), correlated(TOKENS, IN)
    quantized = RTN(bits=4, group_size=16, symmetric=False).compress(Dense.of(w))
    found = pruned(cls(**settings), quantized, x)
    assert isinstance(found, Masked)
    assert found.inner is quantized
    assert torch.equal(found.unpack(), quantized.unpack() * found.survivors())
    again = pruned(cls(sparsity=0.75), found, x)
    assert isinstance(again, Masked)
    assert isinstance(again.inner, GroupInt)
    assert not (again.survivors() & ~found.survivors()).any()


def test_relative_importance_leaves_something_of_every_column() -> None:
    w, x = gaussian(OUT, IN), torch.ones(1, IN)
    w[:, 7] *= 0.01
    assert not mask_of(pruned(Magnitude(scope="layer"), Dense.of(w), x))[:, 7].any()
    assert mask_of(pruned(RIA(), Dense.of(w), x))[:, 7].any()


def test_relative_importance_of_empty_rows_and_columns_is_zero() -> None:
    w, x = gaussian(OUT, IN), correlated(TOKENS, IN)
    w[3], w[:, 9] = 0, 0
    alive = mask_of(pruned(RIA(sparsity=0.5), Dense.of(w), x))
    assert not alive[3].any()
    assert not alive[:, 9].any()


def test_optimal_brain_damage_in_rows_is_wanda() -> None:
    w, x = gaussian(OUT, IN), correlated(TOKENS, IN)
    by_row, wanda = (pruned(method, Dense.of(w), x) for method in (OBD(scope="row"), Wanda()))
    assert torch.equal(by_row.unpack(), wanda.unpack())
    assert not torch.equal(pruned(OBD(), Dense.of(w), x).unpack(), wanda.unpack())


@pytest.mark.parametrize("cls", EVERY, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("where", ["weights", "inputs"])
def test_nan_is_refused_in_one_line(cls: type[Pruning], where: str) -> None:
    w, x = gaussian(OUT, IN), correlated(TOKENS, IN)
    if where == "weights":
        w[2, 3] = torch.nan
    else:
        x[5, 3] = torch.nan
    if cls is Magnitude and where == "inputs":
        return
    with pytest.raises(ValueError, match=r"\A[^\n]*NaN or infinite values; [^\n]*\Z"):
        pruned(cls(), Dense.of(w), x)


@pytest.mark.parametrize("cls", EVERY, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"sparsity": 0}, "sparsity must be more than 0 and less than 1, not 0$"),
        ({"sparsity": 1.0}, "sparsity must be more than 0 and less than 1"),
        ({"sparsity": 50}, "not 50; did you mean 0.5"),
        ({"sparsity": 0.6, "n": 2, "m": 4}, "leave nothing for sparsity=0.6 to say"),
        ({"n": 2}, "n and m go together"),
        ({"n": 4, "m": 4}, "n must be more than 0 and less than m=4"),
        ({"scope": "matrix"}, "scope must be one of row, layer"),
    ],
)
def test_impossible_settings_are_refused(cls: type[Pruning], wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cls(**wrong)


@pytest.mark.parametrize("cls", EVERY, ids=lambda cls: cls.__name__)
def test_what_does_not_fit_a_shape_is_refused(cls: type[Pruning]) -> None:
    with pytest.raises(ValueError, match="a pattern of 2:4 does not divide 30 input features"):
        cls(n=2, m=4).check((8, 30))
    with pytest.raises(ValueError, match=r"sparsity 0\.01 drops none of 32 weights; take a larger one"):
        cls(sparsity=0.01, scope="row").check((OUT, IN))
    with pytest.raises(ValueError, match=r"sparsity 0\.99 drops all of 32 weights; take a smaller one"):
        pruned(cls(sparsity=0.99, scope="row"), Dense.of(gaussian(OUT, IN)), correlated(TOKENS, IN))
    cls(sparsity=0.01, scope="layer").check((OUT, IN))


def test_a_power_below_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="power must be 0 or more"):
        RIA(power=-1)

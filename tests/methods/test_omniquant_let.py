"""OmniQuant's learned scales of channels: rounding and gradient against float64, and what they are worth."""

import pytest
import torch

from decoct.methods.quantize.awq import AWQ
from decoct.methods.quantize.omniquant_let import OmniQuantLET
from decoct.methods.quantize.rtn import RTN
from decoct.methods.quantize.smoothquant import SmoothQuant
from decoct.ops.rounding import rounded_to_extremes
from decoct.stats import AbsMax, Gram
from decoct.weights import Dense
from tests.reference.inputs import correlated, gaussian, output_error
from tests.reference.rounding import on_span

OUT, IN, GROUP = 24, 64, 16


@pytest.mark.parametrize("symmetric", [True, False])
def test_rounding_and_its_gradient(symmetric: bool) -> None:
    x, g = gaussian(4, 3, 16, seed=1).clamp(-3, 3), gaussian(4, 3, 16, seed=2)
    x[..., 0] = 3.5  # a symmetric grid's extreme lies on a tie, which must be the same one in float32
    mine, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    found = rounded_to_extremes(mine, 3, symmetric=symmetric)
    if symmetric:
        expected = on_span(exact, exact.abs().amax(-1, keepdim=True), None, 3)
    else:
        high, low = exact.amax(-1, keepdim=True), -exact.amin(-1, keepdim=True)
        # The zero point is a constant: only the scale carries the span's gradient.
        scale = (high + low) / 7
        zero = (low / scale).round().detach()
        code = (exact / scale + ((exact / scale).round() - exact / scale).detach() + zero).clamp(0, 7)
        expected = scale * (code - zero)
    assert torch.allclose(found.double(), expected, atol=1e-5)
    (by_mine,) = torch.autograd.grad((found * g).sum(), mine)
    (by_exact,) = torch.autograd.grad((expected * g.double()).sum(), exact)
    assert torch.allclose(by_mine.double(), by_exact, rtol=1e-3, atol=1e-3)


def test_groups_of_zeros_stay_zero() -> None:
    x = torch.zeros(2, 3, 8, requires_grad=True)
    for symmetric in (True, False):
        found = rounded_to_extremes(x, 3, symmetric=symmetric)
        (gradient,) = torch.autograd.grad(found.sum(), x)
        assert not found.any()
        assert bool(torch.isfinite(gradient).all())


def salient() -> torch.Tensor:
    x = correlated(200, IN)
    x[:, [3, 17, 40]] *= 20
    return x


def error(w: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, *, symmetric: bool) -> float:
    """Of the outputs, after the matrix is really rounded."""
    made = RTN(bits=3, group_size=GROUP, symmetric=symmetric).compress(Dense.of(w * scale), None)
    return output_error(made.unpack().double() / scale - w, x)


@pytest.mark.parametrize("symmetric", [True, False])
def test_learned_scales_are_better_than_those_of_formulas(symmetric: bool) -> None:
    w, x = gaussian(OUT, IN), salient()
    gram, largest = Gram.empty(IN), AbsMax.empty(IN)
    gram.add(x)
    largest.add(x)
    settings = {"bits": 3, "group_size": GROUP, "symmetric": symmetric}
    found = error(w, x, OmniQuantLET(**settings).scale([w], gram, lambda scale: scale), symmetric=symmetric)
    assert found < 0.9 * error(w, x, torch.ones(IN), symmetric=symmetric)
    assert found < 0.9 * error(w, x, SmoothQuant().scale([w], largest, lambda scale: scale), symmetric=symmetric)
    assert found < error(w, x, AWQ(**settings).scale([w], gram, lambda scale: scale), symmetric=symmetric)


def test_settings_are_checked() -> None:
    for wrong in ({"num_steps": 0}, {"learning_rate": 0.0}, {"alpha": -0.1}, {"bits": 1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            OmniQuantLET(**wrong)

"""AWQ's two searches against plain float64 arithmetic, and what they are worth."""

import pytest
import torch

from decoct.methods.quantize.awq import AWQ
from decoct.methods.quantize.awq_clip import AWQClip
from decoct.methods.quantize.rtn import RTN
from decoct.ops.clip import fit_clip
from decoct.ops.grid import dequantize, fit_grid, quantize
from decoct.stats import Gram
from decoct.weights import Dense
from tests.reference.inputs import correlated, gaussian, hessian, output_error

OUT, IN, GROUP = 24, 64, 16


def gram(x: torch.Tensor) -> Gram:
    stat = Gram.empty(x.shape[1])
    stat.add(x)
    return stat


def salient() -> torch.Tensor:
    x = correlated(200, IN)
    x[:, [3, 17, 40]] *= 20
    return x


def rounded(w: torch.Tensor, bits: int) -> torch.Tensor:
    return RTN(bits=bits, group_size=GROUP).compress(Dense.of(w)).unpack()


@pytest.mark.parametrize("bits", [3, 4])
def test_the_scale_is_the_best_candidate_of_the_papers_formula(bits: int) -> None:
    """All ratios once more, in float64, by the error that the outputs really have."""
    w, x = gaussian(OUT, IN), salient()
    method = AWQ(bits=bits, group_size=GROUP, weight_aware=False)
    found = method.scale([w], gram(x), lambda scale: scale)
    size = x.double().square().mean(0).sqrt()
    errors = {}
    for step in range(20):
        scale = size ** (step / 20)
        scale = (scale / (scale.max() * scale.min()).sqrt()).float()
        errors[step] = output_error(rounded(w * scale, bits).double() / scale - w, x)
    least = output_error(rounded(w * found, bits).double() / found - w, x)
    assert least == pytest.approx(min(errors.values()), rel=1e-3)
    assert least < 0.9 * errors[0]
    assert any(torch.allclose(found / found[0], (size / size[0]).float() ** (step / 20), rtol=1e-3) for step in errors)


def test_looking_at_the_weights_too_never_costs() -> None:
    w, x = gaussian(OUT, IN), salient()
    found = []
    for weight_aware in (False, True):
        scale = AWQ(bits=3, group_size=GROUP, weight_aware=weight_aware).scale([w], gram(x), lambda scale: scale)
        found.append(output_error(rounded(w * scale, 3) / scale - w, x))
    assert found[1] <= found[0] * (1 + 1e-4)


def test_all_readers_count() -> None:
    """A reader whose weights are tiny has nothing to say; one alone decides as if it were there alone."""
    w, x = gaussian(OUT, IN), salient()
    method = AWQ(bits=3, group_size=GROUP, weight_aware=False)
    alone = method.scale([w], gram(x), lambda scale: scale)
    together = method.scale([w, 1e-6 * gaussian(OUT, IN, seed=9)], gram(x), lambda scale: scale)
    assert torch.equal(alone, together)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4])
def test_clip_is_what_trying_every_group_in_turn_gives(bits: int, symmetric: bool) -> None:
    w, x = gaussian(6, IN), correlated(100, IN)
    H = hessian(x)
    settings = {"bits": bits, "group_size": GROUP, "symmetric": symmetric}
    found = fit_clip(w, H.float(), **settings, scale_dtype=torch.float32)  # type: ignore[arg-type]
    spans = fit_grid(w, **settings, scale_dtype=torch.float32)  # type: ignore[arg-type]
    expected = spans.scale.double().clone()
    change = (dequantize(quantize(w, spans), spans) - w).double()
    top = 2**bits - 1
    for row in range(w.shape[0]):
        for group in range(IN // GROUP):
            at = slice(group * GROUP, (group + 1) * GROUP)
            values, span = w[row, at].double(), float(spans.scale[row, group])
            zero = float(2 ** (bits - 1)) if spans.zero is None else float(spans.zero[row, group])
            least = float("inf")
            factors = torch.linspace(1.0, 0.5, 21).tolist()
            for factor in [*factors, *(-each for each in factors)] if symmetric else factors:
                trial = change[row].clone()
                step = span * factor
                codes = (w[row, at] / torch.tensor(step)).round().double()  # ties fall as they do in float32
                trial[at] = (codes + zero).clamp(0, top).sub(zero) * step - values
                error = float(trial @ H @ trial)
                if error < least - 1e-6 * abs(least if least < float("inf") else 0.0):
                    least, best, expected[row, group] = error, trial, step
            change[row] = best
    torch.testing.assert_close(found.scale.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_clipping_never_costs_and_pays_at_few_bits(bits: int) -> None:
    w, x = gaussian(OUT, IN), correlated(300, IN)
    clipped = AWQClip(bits=bits, group_size=GROUP).compress(Dense.of(w), gram(x)).unpack()
    ratio = output_error(clipped - w, x) / output_error(rounded(w, bits) - w, x)
    assert ratio <= (1.0 + 1e-4 if bits > 4 else 0.9)


def test_one_clip_for_a_whole_matrix_is_refused() -> None:
    with pytest.raises(ValueError, match="use a group size or channel"):
        AWQClip(group_size="tensor")


@pytest.mark.parametrize("group_size", [GROUP, "channel"])
def test_ends_that_move_alone_lose_less(group_size: int | str) -> None:
    w, x = gaussian(OUT, IN), correlated(300, IN)
    lost = {}
    for ends in ("alike", "each"):
        method = AWQClip(bits=2, group_size=group_size, symmetric=False, ends=ends)  # type: ignore[arg-type]
        lost[ends] = output_error(method.compress(Dense.of(w), gram(x)).unpack() - w, x)
    assert lost["each"] < 0.99 * lost["alike"]
    with pytest.raises(ValueError, match="needs zero points; set symmetric: false"):
        AWQClip(ends="each")

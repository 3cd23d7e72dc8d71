"""Gradients of a weight's parts are those that finite differences of the unpacked matrix show."""

import pytest
import torch

from decoct.weights import Shared, Weight, for_training, pull_back, trainable
from tests.weights.samples import samples


@pytest.mark.parametrize("name", samples())
def test_against_finite_differences(name: str) -> None:
    weight: Weight = samples()[name]
    if any(isinstance(node, Shared) for node in weight.walk()):
        with pytest.raises(ValueError, match="cannot be trained"):
            pull_back(weight, torch.zeros(weight.shape))
        return
    gradient = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    found = pull_back(weight, gradient)
    parts = trainable(weight)
    assert found.keys() == parts.keys()
    exact = weight.with_tensors({n: t.double() if n in parts else t for n, t in weight.tensors().items()})
    for part, tensor in parts.items():
        assert found[part].shape == tensor.shape
        if tensor.numel() == 0:
            continue
        direction = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)) * tensor.float().abs().mean()
        values = {}
        for sign in (-1, 1):
            moved = exact.with_tensors({**exact.tensors(), part: tensor.double() + sign * 0.5 * direction.double()})
            values[sign] = float((moved.unpack(torch.float32).double() * gradient).sum())
        expected = values[1] - values[-1]
        size = float(found[part].norm() * direction.norm())
        assert float((found[part] * direction).sum()) == pytest.approx(expected, abs=1e-4 * size + 1e-6)


@pytest.mark.parametrize("name", samples())
def test_the_form_for_training_means_the_same(name: str) -> None:
    """Also after its real numbers have changed."""
    weight: Weight = samples()[name]
    form = for_training(weight)
    size = float(weight.unpack(torch.float32).abs().max())
    rounding = 4 * torch.finfo(weight.dtype).eps * max(size, 1e-6)
    torch.testing.assert_close(form.unpack(torch.float32), weight.unpack(torch.float32), rtol=0, atol=rounding)
    changed = {part: 1.25 * tensor for part, tensor in trainable(form).items()}
    assert changed.keys() <= trainable(weight).keys()
    both = [each.with_tensors({**each.tensors(), **changed}).unpack(torch.float32) for each in (form, weight)]
    torch.testing.assert_close(*both, rtol=0, atol=4 * rounding)

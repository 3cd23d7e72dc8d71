"""Views give the matrix that is stored, gradients of everything that is trained, and the weight back."""

import pytest
import torch

from decoct.training.views import Vector, View
from decoct.weights import Shared, Weight, describe, for_training, pull_back, trainable
from tests.weights.samples import samples

KINDS = {name: w for name, w in samples().items() if not any(isinstance(node, Shared) for node in w.walk())}


@pytest.mark.parametrize("name", KINDS)
def test_untouched_it_is_the_same_weight(name: str) -> None:
    weight: Weight = KINDS[name]
    view = View(weight)
    back = view.weight()
    assert describe(back) == describe(weight)
    for part, tensor in weight.tensors().items():
        assert torch.equal(back.tensors()[part], tensor)
    size = float(weight.unpack(torch.float32).abs().max())
    rounding = 4 * torch.finfo(weight.dtype).eps * max(size, 1e-6)  # of what is unpacked in advance
    torch.testing.assert_close(view(torch.float32), weight.unpack(torch.float32), rtol=0, atol=rounding)


@pytest.mark.parametrize("name", KINDS)
def test_gradients_reach_what_is_stored(name: str) -> None:
    weight: Weight = KINDS[name]
    view = View(weight)
    gradient = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    matrix = view(torch.float32)
    if not view.units():
        assert not matrix.requires_grad
        return
    (matrix * gradient).sum().backward()
    expected = pull_back(for_training(weight), gradient)
    parameters = [parameter for parameter, _ in view.units()]
    assert len(parameters) == len(view._names)
    for part, parameter in zip(view._names, parameters, strict=True):
        if part not in expected:
            assert parameter.grad is None
            continue
        assert parameter.grad is not None
        atol = 1e-3 * float(expected[part].abs().max()) + 1e-6
        torch.testing.assert_close(parameter.grad, expected[part], rtol=1e-3, atol=atol)


@pytest.mark.parametrize("name", KINDS)
def test_what_is_stored_afterwards_is_what_training_saw(name: str) -> None:
    """Changed values come back in the same form; codes, masks and positions are the same bits."""
    weight: Weight = KINDS[name]
    view = View(weight)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter, unit in view.units():
            parameter.add_(0.1 * unit * torch.randn(parameter.shape, generator=generator))
    back = view.weight()
    assert describe(back) == describe(weight)
    changed = set(trainable(weight))
    assert all(torch.equal(t, back.tensors()[part]) for part, t in weight.tensors().items() if part not in changed)
    size = float(back.unpack(torch.float32).abs().max())
    rounding = 8 * torch.finfo(weight.dtype).eps * max(size, 1e-6)
    torch.testing.assert_close(view(torch.float32), back.unpack(torch.float32), rtol=0, atol=rounding)


def test_only_what_is_chosen() -> None:
    weight = KINDS["GroupInt"] if "GroupInt" in KINDS else next(iter(KINDS.values()))
    view = View(weight, chosen=lambda _: False)
    assert view.empty
    assert not list(view.parameters())
    assert not view(torch.float32).requires_grad


def test_vectors_are_rounded_to_their_dtype() -> None:
    vector = Vector(torch.tensor([1.0, 2.0], dtype=torch.bfloat16))
    with torch.no_grad():
        vector.values += 1e-3
    seen = vector(torch.float32)
    assert torch.equal(seen, vector.tensor().float())
    seen.sum().backward()
    assert vector.values.grad is not None
    assert torch.equal(vector.values.grad, torch.ones(2))
    assert Vector(torch.zeros(4)).unit == 0.5

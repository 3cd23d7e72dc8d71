"""Adam against the paper's algorithm in float64."""

import pytest
import torch

from decoct.ops.adam import Adam
from tests.reference.adam import adam
from tests.reference.inputs import gaussian

SHAPES = {"matrix": (5, 7), "grouped": (4, 3, 2), "column": (6, 1), "row": (1, 6)}


@pytest.mark.parametrize("size", [1.0, 1e-9], ids=["usual", "tiny"])
def test_steps_against_the_algorithm(size: float) -> None:
    values = {name: gaussian(*shape, seed=n) for n, (name, shape) in enumerate(SHAPES.items())}
    gradients = [{name: size * gaussian(*shape, seed=10 + n) for name, shape in SHAPES.items()} for n in range(6)]
    for each in gradients:
        each["matrix"][0] = 0
    rates = {name: 0.01 * (n + 1) for n, name in enumerate(SHAPES)}
    expected = {
        name: adam(value, [each[name] for each in gradients], [rates[name]] * 6, (0.9, 0.95))
        for name, value in values.items()
    }
    before = values["matrix"][0].clone()
    mover = Adam(values)
    for each in gradients:
        mover.step(values, each, rates)
    for name, value in values.items():
        assert torch.allclose(value.double(), expected[name], rtol=1e-5, atol=1e-6)
    assert torch.equal(values["matrix"][0], before), "what has no gradient stays"

"""E2E-QP's mathematics: steps in units of each entry's size."""

import pytest
import torch

from decoct.methods.quantize.e2e_qp import E2EQP, RelativeAdam, unit


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_unit_is_an_entrys_size_but_not_less_than_a_tenth_of_the_usual() -> None:
    found = unit(torch.tensor([3.0, -4.0, 0.0, 0.0, 0.0]).bfloat16())
    assert found.dtype == torch.float32
    floor = 0.1 * 5**0.5
    torch.testing.assert_close(found, torch.tensor([3.0, 4.0, floor, floor, floor]))
    assert bool((unit(torch.zeros(4)) > 0).all())


def test_steps_are_those_of_adam_where_all_units_are_one() -> None:
    first = torch.ones(5)
    ours = RelativeAdam({"a": first})
    theirs = first.clone().requires_grad_()
    adam = torch.optim.Adam([theirs], lr=0.01, betas=(0.9, 0.95), eps=1e-8)
    for number in range(6):
        gradient = draw(5, seed=number)
        theirs.grad = gradient.clone()
        adam.step()
        ours.step({"a": gradient}, number, 0.01)
    torch.testing.assert_close(ours.value("a"), theirs.detach(), rtol=1e-6, atol=1e-7)


def test_steps_do_not_depend_on_the_scale_of_a_tensor() -> None:
    """With x = s·y the gradient by y is s times that by x: both move by the same fraction of themselves."""
    small, large = RelativeAdam({"a": draw(9) * 1e-3}), RelativeAdam({"a": draw(9) * 1e3})
    for number in range(4):
        gradient = draw(9, seed=number)
        small.step({"a": gradient * 1e3}, number, 0.01)
        large.step({"a": gradient * 1e-3}, number, 0.01)
    torch.testing.assert_close(small.value("a") * 1e6, large.value("a"), rtol=1e-4, atol=0.0)


def test_values_keep_their_dtype_and_small_steps_add_up() -> None:
    """A change below the dtype's resolution is not lost."""
    adam = RelativeAdam({"a": torch.ones(3, dtype=torch.bfloat16)})
    for number in range(200):
        adam.step({"a": torch.ones(3)}, number, 1e-4)
    assert adam.value("a").dtype == torch.bfloat16
    assert float(adam.value("a")[0]) == pytest.approx(1 - 200e-4, abs=4e-3)


def test_the_state_is_all_there_is_to_save() -> None:
    one, two = (RelativeAdam({"a": draw(4), "b": draw(2, 3)}) for _ in range(2))
    one.step({"a": draw(4), "b": draw(2, 3)}, 0, 0.01)
    for kind, values in one.state.items():
        two.state[kind].update({name: tensor.clone() for name, tensor in values.items()})
    for adam in (one, two):
        adam.step({"a": draw(4, seed=3)}, 1, 0.01)
    assert all(torch.equal(one.value(name), two.value(name)) for name in ("a", "b"))
    assert "a" in one
    assert "c" not in one


def test_a_gradient_that_is_not_finite_is_named() -> None:
    with pytest.raises(ValueError, match=r"the gradient of a is not finite; lower e2e_qp\.learning_rate"):
        RelativeAdam({"a": draw(4)}).step({"a": torch.full((4,), torch.nan)}, 0, 0.01)


def test_the_rate_rises_and_falls() -> None:
    method = E2EQP(num_steps=40, learning_rate=0.01)
    rates = [method.rate(step) for step in range(40)]
    assert rates[0] < rates[2] < max(rates) <= 0.01
    assert max(rates) > 0.009
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert 0 < rates[-1] < 1e-4


@pytest.mark.parametrize("wrong", [{"num_steps": 0}, {"batch_size": 0}, {"learning_rate": 0.0}, {"learning_rate": 1.0}])
def test_wrong_settings(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"must be at least 1|must lie between 0 and 1"):
        E2EQP(**wrong)

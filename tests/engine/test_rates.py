"""How fast this machine is: what else it does at the moment changes neither estimates nor what blocks run in."""

from collections.abc import Iterator
from itertools import count

import pytest
import torch

from decoct.engine import budget


class Clock:
    """Products of a machine with these rates, of which other programs slow all but every seventh down, fortyfold."""

    def __init__(self, rates: dict[torch.dtype, float]) -> None:
        self.now, self.rates, self.products = 0.0, rates, count()

    def perf_counter(self) -> float:
        return self.now

    def multiply(self, factor: torch.Tensor) -> None:
        slower = 1 if next(self.products) % 7 == 6 else 40
        self.now += slower * 2 * factor.shape[0] ** 3 / self.rates[factor.dtype]


@pytest.fixture(autouse=True)
def _measured_anew() -> Iterator[None]:
    budget._product_rates.cache_clear()
    yield
    budget._product_rates.cache_clear()


@pytest.mark.parametrize(("half", "chosen"), [(9e11, torch.bfloat16), (1e11, torch.float32)])
def test_other_programs_do_not_count(half: float, chosen: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock({torch.float32: 2e11, torch.bfloat16: half})
    monkeypatch.setattr(budget, "time", clock)
    monkeypatch.setattr(torch.Tensor, "__matmul__", clock.multiply)
    assert budget.compute_dtype(torch.bfloat16) == chosen
    for dtype, rate in clock.rates.items():
        assert budget.product_rate(dtype) == pytest.approx(rate)
    products = next(clock.products)
    assert budget.compute_dtype(torch.float16) == budget.compute_dtype(torch.float32) == torch.float32
    assert next(clock.products) == products + 1, "measured once"


def test_this_machine() -> None:
    assert 1e8 < budget.product_rate(torch.float32) < 1e16
    assert budget.product_rate(torch.float16) == budget.product_rate(torch.float32)

"""Products of prompts: in float32 where a processor is slow with 16 bits, with the same numbers."""

import pytest
import torch

from decoct.runtime.kernels import dense
from decoct.runtime.kernels.dense import dense_product


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("slow", [True, False])
def test_products_are_rounded_once(dtype: torch.dtype, slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "_slow", lambda _: slow)
    generator = torch.Generator().manual_seed(0)
    x, matrix = (torch.randn(rows, 96, generator=generator).to(dtype) for rows in (40, 24))
    found = dense_product(x.reshape(2, 20, 96), matrix)
    assert found.dtype == dtype
    assert found.shape == (2, 20, 24)
    exact = x.double() @ matrix.double().T
    size = x.double().abs() @ matrix.double().abs().T
    error = (found.double().reshape(40, 24) - exact).abs()
    assert (error <= torch.finfo(dtype).eps / 2 * exact.abs() + 4e-6 * size).all()


def test_only_what_is_much_slower_is_converted(monkeypatch: pytest.MonkeyPatch) -> None:
    takes = {torch.float32: 1.0, torch.bfloat16: 0.3, torch.float16: 3.0}
    monkeypatch.setattr(dense, "_seconds", takes.__getitem__)
    chosen = {dtype: dense._slow.__wrapped__(dtype) for dtype in (*takes, torch.float64)}
    assert chosen == {torch.float32: False, torch.bfloat16: False, torch.float16: True, torch.float64: False}


def test_what_a_product_takes_is_measured() -> None:
    assert 0 < dense._seconds(torch.float32) < 60

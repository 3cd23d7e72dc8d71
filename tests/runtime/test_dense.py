"""Products of prompts: in float32 where a processor is slow with 16 bits, with the same numbers."""

import pytest
import torch

from decoct.runtime.kernels import dense
from decoct.runtime.kernels.dense import dense_product


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("slow", [True, False])
def test_products_are_rounded_once(dtype: torch.dtype, slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []

    def spy(x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        found = torch.nn.functional.linear(x, matrix)
        seen.extend((x.dtype, found.dtype))
        return found

    monkeypatch.setattr(dense, "_slow", lambda _: slow)
    monkeypatch.setattr(dense, "_AT_ONCE", 10 * 96)
    monkeypatch.setattr(dense, "linear", spy)
    generator = torch.Generator().manual_seed(0)
    x, matrix = (torch.randn(rows, 96, generator=generator).to(dtype) for rows in (40, 24))
    with torch.autocast("cpu", enabled=slow):
        found = dense_product(x.reshape(2, 20, 96), matrix)
    assert seen == ([torch.float32] * 6 if slow else [dtype] * 2), "ten rows of the matrix at a time"
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


def test_gradients_keep_no_wider_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[torch.dtype] = []

    def keep(saved: torch.Tensor) -> torch.Tensor:
        kept.append(saved.dtype)
        return saved

    monkeypatch.setattr(dense, "_slow", lambda _: True)
    x, matrix = torch.randn(3, 8).bfloat16().requires_grad_(), torch.randn(4, 8).bfloat16()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        found = dense_product(x, matrix)
    found.sum().backward()
    assert x.grad is not None
    assert set(kept) == {torch.bfloat16}


def test_what_a_product_takes_is_measured_in_its_own_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(dense, "linear", lambda x, matrix: seen.append((x @ matrix.T).dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
        assert dense._seconds(torch.float32) > 0
    assert seen == [torch.float32] * 3

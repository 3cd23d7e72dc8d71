"""Attention of prompts by the compiled kernels, at every instruction level, against float64."""

import pytest
import torch
from torch import Tensor

from decoct.native import attention
from decoct.native.attention import attend
from decoct.native.library import library

FOUND = library()
LEVELS = FOUND.levels if FOUND else ()
pytestmark = pytest.mark.skipif(FOUND is None, reason="decoct was installed without its compiled kernels")
fast = pytest.mark.skipif(not set(LEVELS) & set(attention._FASTER), reason="torch attends on this processor")
# tokens, seen, heads, heads of keys and values, channels, window
SHAPES = [
    (2, 2, 1, 1, 8, None),
    (7, 7, 4, 2, 16, None),
    (5, 50, 3, 3, 40, None),
    (33, 70, 8, 1, 64, 20),
    (17, 33, 6, 2, 80, 1),
    (20, 300, 9, 3, 64, None),
    (40, 40, 2, 2, 128, 32),
]


def drawn(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exact(
    queries: Tensor, keys: Tensor, values: Tensor, scale: float, score_cap: float | None, window: int | None
) -> Tensor:
    """In float64, with all scores at once."""
    (heads, tokens, _), seen = queries.shape[1:], keys.shape[2]
    keys, values = (each.double().repeat_interleave(heads // each.shape[1], 1) for each in (keys, values))
    scores = queries.double() @ keys.transpose(2, 3) * scale
    if score_cap is not None:
        scores = torch.tanh(scores / score_cap) * score_cap
    at, other = torch.arange(seen - tokens, seen).unsqueeze(1), torch.arange(seen)
    visible = (other <= at) & (other > at - (window or seen))
    return (torch.softmax(scores.masked_fill(~visible, -torch.inf), -1) @ values).transpose(1, 2)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("score_cap", [None, 3.0])
def test_every_level(level: str, dtype: torch.dtype, score_cap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = library()  # now: other tests have it loaded anew
    assert kernels is not None
    monkeypatch.setattr(kernels, "levels", (level,))
    monkeypatch.setattr(attention, "_FASTER", (level,))
    for tokens, seen, heads, kv_heads, channels, window in SHAPES:
        # As a decoder's cache holds them: room for more tokens behind those seen; and keys beside queries.
        queries = drawn(2, tokens, heads + 2, channels, seed=0, dtype=dtype)[:, :, :heads].transpose(1, 2)
        keys, values = (drawn(2, kv_heads, seen + 9, channels, seed=k, dtype=dtype)[:, :, :seen] for k in (1, 2))
        found = attend(queries, keys, values, scale=0.3, score_cap=score_cap, window=window)
        wanted = exact(queries, keys, values, 0.3, score_cap, window)
        assert found is not None
        assert found.dtype == dtype
        # Shares of positions are rounded to the dtype before values are multiplied with them, as torch does.
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(found.double(), wanted, rtol=eps, atol=5e-6 if dtype == torch.float32 else eps)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients(level: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = library()  # now: other tests have it loaded anew
    assert kernels is not None
    monkeypatch.setattr(kernels, "levels", (level,))
    monkeypatch.setattr(attention, "_FASTER", (level,))
    for _, seen, heads, kv_heads, channels, window in SHAPES:
        given = (
            drawn(2, seen, heads, channels, seed=0, dtype=dtype).transpose(1, 2),
            *(drawn(2, kv_heads, seen, channels, seed=k, dtype=dtype) for k in (1, 2)),
        )
        upstream = drawn(2, seen, heads, channels, seed=3, dtype=dtype)
        ours = [each.clone().requires_grad_() for each in given]
        found = attend(*ours, scale=0.3, window=window)
        assert found is not None
        found.backward(upstream)
        theirs = [each.double().requires_grad_() for each in given]
        exact(*theirs, 0.3, None, window).backward(upstream.double())
        # What is rounded on the way to 16 bits: shares, and the result that the gradients are made of.
        eps = torch.finfo(dtype).eps
        largest = max(float(each.grad.abs().max()) for each in theirs if each.grad is not None)
        for mine, other in zip(ours, theirs, strict=True):
            assert mine.grad is not None
            assert other.grad is not None
            limit = (4e-6 if dtype == torch.float32 else 2 * eps) * largest
            torch.testing.assert_close(mine.grad.double(), other.grad, rtol=eps, atol=limit)


@fast
def test_threads_do_not_matter() -> None:
    queries, keys = drawn(2, 6, 65, 32, seed=0, dtype=torch.float32), drawn(2, 2, 65, 32, seed=1, dtype=torch.float32)
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        mine = queries.clone().requires_grad_(), keys.clone().requires_grad_()
        out = attend(*mine, keys, scale=0.2)
        assert out is not None
        out.square().sum().backward()
        found.append([out.detach(), mine[0].grad, mine[1].grad])
    for alone, together in zip(*found, strict=True):
        assert alone is not None
        assert together is not None
        assert torch.equal(alone, together)


@fast
def test_a_nan_stays_one() -> None:
    queries, keys = drawn(1, 2, 4, 8, seed=0, dtype=torch.float32), drawn(1, 2, 4, 8, seed=1, dtype=torch.float32)
    values = keys.clone()
    keys[0, 0, 2] = torch.nan
    out = attend(queries, keys, values, scale=1.0)
    assert out is not None
    assert out[0, 2:, 0].isnan().all()
    assert out[0, :2].isfinite().all()
    assert out[0, :, 1].isfinite().all()


@fast
def test_what_the_kernels_cannot_read_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, keys = drawn(1, 2, 4, 8, seed=0, dtype=torch.float32), drawn(1, 2, 4, 8, seed=1, dtype=torch.float32)
    apart = drawn(1, 2, 4, 16, seed=1, dtype=torch.float32)[..., ::2]
    assert attend(queries, apart, apart, scale=1.0) is None
    assert attend(queries, keys, keys.double(), scale=1.0) is None
    assert attend(queries.double(), keys.double(), keys.double(), scale=1.0) is None
    learned = queries.clone().requires_grad_()
    assert attend(learned, keys, keys, scale=1.0, score_cap=2.0) is None
    assert attend(learned[:, :, 2:], keys, keys, scale=1.0) is None
    assert attend(queries, keys, keys, scale=1.0) is not None
    monkeypatch.setattr(attention, "_FASTER", ())
    assert attend(queries, keys, keys, scale=1.0) is None
    monkeypatch.undo()
    monkeypatch.setattr(attention, "library", lambda: None)
    assert attend(queries, keys, keys, scale=1.0) is None

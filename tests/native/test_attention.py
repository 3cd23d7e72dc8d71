"""Attention of prompts by the compiled kernels, at every instruction level, against float64."""

import pytest
import torch
from torch import Tensor

from decoct.native import attention
from decoct.native.attention import attend_prompt
from decoct.native.library import library

FOUND = library()
LEVELS = FOUND.levels if FOUND else ()
pytestmark = pytest.mark.skipif(FOUND is None, reason="decoct was installed without its compiled kernels")
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
    (tokens, heads, _), seen = queries.shape, keys.shape[1]
    keys, values = (each.double().repeat_interleave(heads // len(each), 0) for each in (keys, values))
    scores = torch.einsum("thc,hsc->hts", queries.double(), keys) * scale
    if score_cap is not None:
        scores = torch.tanh(scores / score_cap) * score_cap
    at, other = torch.arange(seen - tokens, seen).unsqueeze(1), torch.arange(seen)
    visible = (other <= at) & (other > at - (window or seen))
    return torch.einsum("hts,hsc->thc", torch.softmax(scores.masked_fill(~visible, -torch.inf), -1), values)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("score_cap", [None, 3.0])
def test_every_level(level: str, dtype: torch.dtype, score_cap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert FOUND is not None
    monkeypatch.setattr(FOUND, "levels", (level,))
    for tokens, seen, heads, kv_heads, channels, window in SHAPES:
        # As a decoder's cache holds them: room for more tokens behind those seen; and keys beside queries.
        queries = drawn(tokens, heads + 2, channels, seed=0, dtype=dtype)[:, :heads]
        keys, values = (drawn(kv_heads, seen + 9, channels, seed=k, dtype=dtype)[:, :seen] for k in (1, 2))
        found = attend_prompt(queries, keys, values, scale=0.3, score_cap=score_cap, window=window)
        wanted = exact(queries, keys, values, 0.3, score_cap, window)
        assert found is not None
        assert found.dtype == dtype
        # Shares of positions are rounded to the dtype before values are multiplied with them, as torch does.
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(found.double(), wanted, rtol=eps, atol=5e-6 if dtype == torch.float32 else eps)


def test_threads_do_not_matter() -> None:
    queries, keys = drawn(65, 6, 32, seed=0, dtype=torch.float32), drawn(2, 65, 32, seed=1, dtype=torch.float32)
    settings = {"scale": 0.2, "score_cap": None, "window": None}
    torch.set_num_threads(1)
    alone = attend_prompt(queries, keys, keys, **settings)
    torch.set_num_threads(3)
    together = attend_prompt(queries, keys, keys, **settings)
    assert alone is not None
    assert together is not None
    assert torch.equal(alone, together)


def test_what_the_kernels_cannot_read_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, keys = drawn(4, 2, 8, seed=0, dtype=torch.float32), drawn(2, 4, 8, seed=1, dtype=torch.float32)
    settings = {"scale": 1.0, "score_cap": None, "window": None}
    apart = drawn(2, 4, 16, seed=1, dtype=torch.float32)[:, :, ::2]
    assert attend_prompt(queries, apart, apart, **settings) is None
    assert attend_prompt(queries, keys, keys.double(), **settings) is None
    assert attend_prompt(queries.double(), keys.double(), keys.double(), **settings) is None
    monkeypatch.setattr(attention, "library", lambda: None)
    assert attend_prompt(queries, keys, keys, **settings) is None

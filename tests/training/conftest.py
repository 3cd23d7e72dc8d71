"""Tests of training run many tiny models: one thread, and no measuring of how fast this machine multiplies."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.engine.running import make_base


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for module in ("engine.estimate", "engine.plan_depth", "engine.plan_tuning", "training.plan"):
        monkeypatch.setattr(f"decoct.{module}.product_rate", lambda _: 1e11)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer, for reading only; its text lies beside it."""
    return make_base(tmp_path_factory.mktemp("tiny"))

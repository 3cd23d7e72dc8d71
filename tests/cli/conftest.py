"""A small model, a text and a compressed model for the commands."""

from pathlib import Path

import pytest

import decoct
from tests.engine.running import make_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("cli"), "llama-tied", max_position_embeddings=1024)


@pytest.fixture(scope="module")
def text(base: Path) -> Path:
    return base.parent / "text.txt"


@pytest.fixture(scope="module")
def compressed(base: Path) -> Path:
    recipe = {"stages": [{"blocks": [{"linear": {"rtn": {"bits": 4, "group_size": 16}}}]}]}
    return decoct.compress(base, recipe, base.parent / "compressed").folder


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("estimate", "plan_tuning"):
        monkeypatch.setattr(f"decoct.engine.{module}.product_rate", lambda _: 1e11)
